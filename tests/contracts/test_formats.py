"""Laws that every file format keeps, against ΔW by the formula of the tool that writes it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pimerge
from pimerge.adapters.expert import open_expert
from pimerge.adapters.format import FORMATS
from tests.support.adapter_files import BUILDERS, FORMAT_OF, deltas_in, tensors_in, written
from tests.support.numerics import relative_difference, small

FORMS = sorted(BUILDERS)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a module, or of the update of a bias."""
    assert found.keys() == expected.keys()
    return max(relative_difference(found[name], expected[name]) for name in expected)


def weighted(paths: list[Path], weights: list[float]) -> dict[str, Tensor]:
    each = [deltas_in(path) for path in paths]
    return {name: sum(w * one[name] for w, one in zip(weights, each, strict=True)) for name in each[0]}  # type: ignore[misc]


def test_every_format_of_other_tools_is_tried() -> None:
    assert {*FORMAT_OF.values(), "peft"} == set(FORMATS.names())


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_read_as_its_tool_reads_it(form: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", form, 1)
    expert = open_expert(path)
    assert expert.format == FORMAT_OF[form]
    found = {}
    for name, module in expert.modules.items():
        factors, stem = expert.factors(name), expert.places[name].stem
        delta = factors.scaling * factors.B.double() @ factors.A.double()
        found[f"{stem}:bias" if expert.places[name].whole == "diff_b" else stem] = delta
        if factors.bias is not None:
            found[f"{stem}:bias"] = factors.scaling * factors.bias.double()
        assert delta.shape == (module.d_out, module.d_in)
    expected = {name: delta.reshape(len(delta), -1) for name, delta in deltas_in(path).items()}
    assert distance({name: delta.reshape(len(delta), -1) for name, delta in found.items()}, expected) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_read_and_written_again_is_the_same_update(form: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", form, 1)
    pimerge.merge(path, output=tmp_path / "out", head="none")
    assert distance(deltas_in(tmp_path / "out"), deltas_in(path)) < 1e-5
    again = open_expert(tmp_path / "out")
    assert again.format == FORMAT_OF[form]
    assert {name: place.stem for name, place in again.places.items()} == {
        name: place.stem for name, place in open_expert(path).places.items()
    }


@given(
    form=st.sampled_from(FORMS),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    alphas=st.tuples(*[st.sampled_from([0.25, 1.0, 3.0, 16.0])] * 2),
    weights=st.tuples(*[st.sampled_from([0.5, -0.3, 0.7, 1.0])] * 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(small, max_examples=25)
def test_a_merge_is_the_weighted_sum_of_the_tools_updates(
    form: str, ranks: tuple[int, int], alphas: tuple[float, float], weights: tuple[float, float], dtype: torch.dtype
) -> None:
    with TemporaryDirectory() as folder:
        paths = [
            written(Path(folder) / f"{i}.safetensors", form, 7 + i * 400, rank=ranks[i], alpha=alphas[i], dtype=dtype)
            for i in range(2)
        ]
        output = Path(folder) / "merged"
        pimerge.merge(paths, method="interpolated", weights=list(weights), output=output, dtype="float32")
        assert distance(deltas_in(output), weighted(paths, list(weights))) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["ties", "tsv"])
def test_other_methods_and_ranks_give_files_of_the_format(form: str, method: str, tmp_path: Path) -> None:
    paths = [written(tmp_path / f"{seed}.safetensors", form, seed) for seed in (1, 500)]
    pimerge.merge(paths, method=method, rank="auto", output=tmp_path / "out", verify=True)
    merged = open_expert(tmp_path / "out")
    assert merged.format == FORMAT_OF[form]
    assert all(torch.isfinite(tensor).all() for tensor in tensors_in(tmp_path / "out").values())
