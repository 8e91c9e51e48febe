"""Converted adapters give PEFT the updates of their sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pimerge
from pimerge.adapters.expert import open_expert
from pimerge.core.errors import AlreadyDone, PimergeError
from tests.support.bases import inputs, model_for
from tests.support.experts import MakeExpert, dense_deltas, layers_expert, raw_expert, updates_of
from tests.support.numerics import relative_difference
from tests.support.peft_outputs import open_strictly


def pickled(folder: Path) -> Path:
    """The same adapter as PEFT saved it before safetensors."""
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return folder


def logits(model: nn.Module, base: Path) -> Tensor:
    with torch.no_grad():
        return model(**inputs(base.name)).logits  # type: ignore[no-any-return]


def test_a_pickled_adapter_loads_as_before(tmp_path: Path, bert_base: Path, make_expert: MakeExpert) -> None:
    source = make_expert(tmp_path / "a", bert_base)
    before = logits(open_strictly(model_for(bert_base), source), bert_base)
    pickled(source)
    (source / "training_args.bin").write_bytes(b"\x80")
    (source / "README.md").write_text("a card")
    with pytest.raises(PimergeError, match=rf"pimerge convert {source} -o NEW"):
        pimerge.merge([source], output=tmp_path / "merged")
    with pytest.raises(PimergeError, match=rf"is a pickle[\s\S]*pimerge convert {source}/adapter_model\.bin -o NEW"):
        pimerge.merge([source / "adapter_model.bin"], output=tmp_path / "merged")
    converted = pimerge.convert(source, output=tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    assert torch.equal(logits(open_strictly(model_for(bert_base), tmp_path / "b"), bert_base), before)
    assert converted.to_dict()["files"] == ["adapter_model.safetensors"]
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert open_expert(tmp_path / "b").base.folder == bert_base
    assert config | {"base_model_name_or_path": ""} == json.loads((source / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": ""
    }
    pimerge.convert(source / "adapter_model.bin", output=tmp_path / "c")
    assert (tmp_path / "c" / "adapter_config.json").is_file()


def test_a_single_file_becomes_a_single_file(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(6.0).view(2, 3).T}  # not contiguous
    torch.save(tensors, tmp_path / "x.pt")
    for output in (tmp_path / "new" / "y.safetensors", tmp_path / "folder"):
        pimerge.convert(tmp_path / "x.pt", output=output)
        path = output if output.suffix else output / "x.safetensors"
        assert torch.equal(load_file(path)["x"], tensors["x"])
    with pytest.raises(AlreadyDone, match="is there already"):
        pimerge.convert(tmp_path / "x.pt", output=tmp_path / "new" / "y.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(PimergeError, match="already exists"):
        pimerge.convert(tmp_path / "other.pt", output=tmp_path / "new" / "y.safetensors")
    assert torch.equal(load_file(tmp_path / "new" / "y.safetensors")["x"], tensors["x"])


@pytest.mark.parametrize("kind", ["loha", "lokr", "fourierft", "delora"])
@pytest.mark.parametrize("rank", [3, "max"])
def test_a_kind_with_updates_becomes_the_nearest_lora(
    tmp_path: Path, bert_base: Path, make_expert: MakeExpert, kind: str, rank: int | str
) -> None:
    source = make_expert(tmp_path / "a", bert_base, kind=kind, modules_to_save=None)
    converted = pimerge.convert(source, rank=rank, output=tmp_path / "b")
    base = model_for(bert_base).state_dict()
    expected = open_strictly(model_for(bert_base), source).merge_and_unload().state_dict()
    found = open_strictly(model_for(bert_base), tmp_path / "b").merge_and_unload().state_dict()
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    changed = [key for key in base if not torch.equal(base[key], expected[key])]
    assert changed
    for key in base:
        delta, own = ((state[key] - base[key]).double() for state in (expected, found))
        if key not in changed:
            assert torch.equal(own, delta)
            continue
        singular = torch.linalg.svdvals(delta)
        kept = len(singular) if rank == "max" else int(rank)
        least = float(singular[kept:].norm() / singular.norm())  # of all matrices of this rank
        assert torch.linalg.matrix_rank(own, atol=1e-4) <= kept
        assert relative_difference(own, delta) == pytest.approx(least, abs=2e-4)
        name = key.removesuffix(".weight")
        assert converted.to_dict()["modules"][name]["truncation"] == pytest.approx(least, abs=2e-4)


def test_dora_needs_its_base_and_becomes_a_plain_lora(tmp_path: Path, bert_base: Path, make_expert: MakeExpert) -> None:
    source = make_expert(tmp_path / "a", bert_base, use_dora=True)
    pimerge.convert(source, rank="max", base=bert_base, output=tmp_path / "b")
    before = logits(open_strictly(model_for(bert_base), source), bert_base)
    after = logits(open_strictly(model_for(bert_base), tmp_path / "b"), bert_base)
    assert relative_difference(after, before) < 1e-5
    assert not json.loads((tmp_path / "b" / "adapter_config.json").read_text()).get("use_dora")


def test_energy_alone_chooses_the_rank(tmp_path: Path) -> None:
    A = torch.diag(torch.tensor([10.0, 1.0, 0.1]))
    source = raw_expert(tmp_path / "a", {"q": (A, torch.eye(3))})
    converted = pimerge.convert(source, energy=0.9, output=tmp_path / "b")
    expert = open_expert(tmp_path / "b")
    assert expert.ranks == (1,)
    assert torch.allclose(dense_deltas(expert)["q"], torch.diag(torch.tensor([10.0, 0, 0])).double(), atol=1e-6)
    assert converted.merged is not None


def test_a_pickled_adapter_changes_its_rank_at_once(tmp_path: Path) -> None:
    source = layers_expert(tmp_path / "a", target_modules=["proj", "other", "conv"])
    pimerge.convert(source, rank=1, output=tmp_path / "b")
    expected = dense_deltas(open_expert(tmp_path / "b"))
    pimerge.convert(pickled(source), rank=1, output=tmp_path / "c")
    found = open_expert(tmp_path / "c")
    for name, delta in dense_deltas(found).items():
        assert relative_difference(delta, expected[name]) < 1e-6
    assert found.config["base_model_name_or_path"] == "org/layers"
    assert json.loads((tmp_path / "c" / "coefficients.json").read_text())["experts"] == ["../a"]


def test_what_needs_no_conversion_is_said(tmp_path: Path, bert_base: Path, make_expert: MakeExpert) -> None:
    source = raw_expert(tmp_path / "a", updates_of({"q": (3, 2, 4)}))
    with pytest.raises(PimergeError, match=r"nothing to convert\n.*pass --rank N"):
        pimerge.convert(source, output=tmp_path / "b")
    with pytest.raises(PimergeError, match="safetensors: there is nothing to convert"):
        pimerge.convert(bert_base, output=tmp_path / "b")
    with pytest.raises(PimergeError, match="there is no"):
        pimerge.convert(tmp_path / "gone", output=tmp_path / "b")
    with pytest.raises(PimergeError, match="is the input or contains it"):
        pimerge.convert(source, rank=1, output=tmp_path, force=True)
    ia3 = make_expert(tmp_path / "i", bert_base, kind="ia3")
    with pytest.raises(PimergeError, match=r"of kind ia3, which has no LoRA: .*depends on the base's weights"):
        pimerge.convert(ia3, rank=2, output=tmp_path / "b")
    torch.save(load_file(bert_base / "model.safetensors"), tmp_path / "x.bin")
    with pytest.raises(PimergeError, match="is not an adapter"):
        pimerge.convert(tmp_path / "x.bin", rank=2, output=tmp_path / "b")
    assert not (tmp_path / "b").exists()
