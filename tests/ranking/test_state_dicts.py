"""Plain state dicts: a folder of files is ranked by their numbers, and merged as the ranking says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.cli import Shell

States = dict[str, dict[str, Tensor]]


@pytest.fixture
def states(tmp_path: Path) -> States:
    """Three files that lie more and more far from one start."""
    generator = torch.Generator().manual_seed(0)
    start = {"a.weight": torch.randn(40, 30, generator=generator), "b": torch.randn(7, generator=generator)}
    (tmp_path / "states").mkdir()
    found: States = {}
    for number, name in enumerate("xyz"):
        noise = {key: 0.4 * number * torch.randn(value.shape, generator=generator) for key, value in start.items()}
        found[name] = {key: (value + noise[key]).to(torch.bfloat16) for key, value in start.items()}
        save_file({**found[name], "steps": torch.tensor([3])}, tmp_path / "states" / f"{name}.safetensors")
    return found


def cosine(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    a, b = (torch.cat([tensors[key].double().ravel() for key in first]) for tensors in (first, second))
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize(
    "given", [["--target", "states/x.safetensors"], ["--store", "states", "--target", "x", "--measure", "parameters"]]
)
def test_the_score_is_the_cosine_of_all_floating_numbers(states: States, shell: Shell, given: list[str]) -> None:
    result = shell("rank", *given, "-k", "1", "--json")
    assert result.code == 0, result.err
    document = json.loads(Path("ranking.json").read_text())
    assert document == result.document
    assert (document["measure"], document["selected"]) == ("parameters", ["y"])
    scores = {candidate["name"]: candidate["score"] for candidate in document["candidates"]}
    assert scores == {name: pytest.approx(cosine(states["x"], states[name])) for name in "yz"}
    assert all(each["low"] <= each["score"] <= each["high"] for each in document["candidates"])


def test_with_a_base_the_score_is_the_cosine_of_what_was_added(states: States, shell: Shell) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = {key: torch.randn(value.shape, generator=generator) for key, value in states["x"].items()}
    base = {key: (value + noise[key]).to(torch.bfloat16) for key, value in states["x"].items()}
    save_file({**base, "steps": torch.tensor([0])}, "states/base.safetensors")
    save_file(base, "states/same.safetensors")
    given = ("--target", "states/x.safetensors", "--base", "states/base.safetensors")
    result = shell("rank", *given, "--json")
    assert result.code == 0, result.err
    added = {name: {key: states[name][key].double() - base[key].double() for key in base} for name in "xyz"}
    scores = {candidate["name"]: candidate["score"] for candidate in result.document["candidates"]}
    assert scores == {name: pytest.approx(cosine(added["x"], added[name])) for name in "yz"}
    reasons = {each["name"]: each["reason"] for each in result.document["not_comparable"]}
    assert reasons == {"same": "it holds the same numbers as the base"}
    assert result.document["notes"] == ["compared by their difference from 'states/base.safetensors'"]
    save_file(base | {"b": torch.ones(8)}, "wide.safetensors")
    save_file(states["x"], "own.safetensors")
    for other, said in (
        ("wide.safetensors", "'b' is (8,), the target's (7,)"),
        ("own.safetensors", "holds the same numbers as the base"),
        ("bert-base", "expected the .safetensors file that these state dicts were trained from"),
    ):
        refused = shell("rank", *given[:3], other, "-o", "late.json")
        assert (refused.code, Path("late.json").exists()) == (3, False)
        assert said in refused.err


def test_merge_takes_what_was_selected(states: States, shell: Shell) -> None:
    assert shell("rank", "--target", "states/x.safetensors").code == 0
    assert shell("merge", "--dtype", "float32").code == 0
    found = load_file("merged/y.safetensors")
    for key in states["x"]:
        torch.testing.assert_close(found[key], (states["y"][key].float() + states["z"][key].float()) / 2)
    assert shell("merge", "--method", "interpolated", "--dtype", "float32", "-o", "with-x").code == 0
    scores = torch.tensor([cosine(states["x"], states[name]) for name in "yz"])
    weights = [1 / 3, *(2 / 3 * scores.softmax(0)).tolist()]
    found = load_file("with-x/x.safetensors")
    for key in states["x"]:
        expected = sum(w * states[name][key].float() for w, name in zip(weights, "xyz", strict=True))
        torch.testing.assert_close(found[key], expected)
    fishers = {name: {key: torch.rand(value.shape) + 0.1 for key, value in states[name].items()} for name in "xyz"}
    for name, tensors in fishers.items():
        save_file(tensors, f"{name}-fisher.safetensors")
    files = [part for name in "xyz" for part in ("--fisher", f"{name}-fisher.safetensors")]
    assert (
        shell("merge", "--method", "fisher", *files, "--dtype", "float32", "-o", "by-fisher", "--floor", "0").code == 0
    )
    found = load_file("by-fisher/x.safetensors")
    for key in states["x"]:
        weighted = sum(fishers[name][key] * states[name][key].float() for name in "xyz")
        torch.testing.assert_close(found[key], weighted / sum(fishers[name][key] for name in "xyz"))
    save_file(states["z"], "states/y.safetensors")
    changed = shell("merge", "-o", "late")
    assert changed.code == 3
    assert "'ranking.json'" in changed.err
    assert not Path("late").exists()


def test_files_that_do_not_compare_say_why(states: States, shell: Shell) -> None:
    own = states["x"]
    save_file({"a.weight": own["a.weight"]}, "states/less.safetensors")
    save_file(own | {"c": torch.ones(2)}, "states/more.safetensors")
    save_file(own | {"b": torch.ones(8)}, "states/wide.safetensors")
    save_file(own | {"b": torch.full((7,), float("nan"))}, "states/nan.safetensors")
    Path("states/broken.safetensors").write_bytes(b"no tensors")
    torch.save(own, "states/pickled.pt")
    (Path("states") / "notes.txt").write_text("no state dict")
    result = shell("rank", "--target", "states/x.safetensors", "--json")
    assert result.code == 0, result.err
    reasons = {each["name"]: each["reason"] for each in result.document["not_comparable"]}
    assert {name: reason for name, reason in reasons.items() if name in ("less", "more", "wide", "nan")} == {
        "less": "it has no 'b'",
        "more": "it has 'c', which the target lacks",
        "wide": "'b' is (8,), the target's (7,)",
        "nan": "'b' holds NaN or Inf",
    }
    assert "truncated" in reasons["broken"]
    assert "pickle" in reasons["pickled.pt"]
    assert len(reasons) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "states/p.pt"], "states/p.pt"),
        (["--target", "states/nan.safetensors"], "'b' of the target 'states/nan.safetensors' holds NaN or Inf"),
        (["--target", "alone/x.safetensors"], "'alone' holds no other state dict than the target"),
        (["--store", "states", "--target", "xx"], "there is no state dict 'xx' in 'states'\n  → did you mean 'x'?"),
        (["--target", "states/x.safetensors", "--measure", "fisher"], "use --measure parameters"),
        (["--target", "states/x.safetensors", "--shots", "2", "--train-target"], "--train-target does not apply"),
        (["--target", "states/x.safetensors", "--explain", "y"], "--explain and --calibrate do not apply"),
    ],
)
def test_what_cannot_be_ranked_is_refused(states: States, shell: Shell, arguments: list[str], said: str) -> None:
    torch.save(states["x"], "states/p.pt")
    save_file(states["x"] | {"b": torch.full((7,), float("nan"))}, "states/nan.safetensors")
    Path("alone").mkdir()
    save_file(states["x"], "alone/x.safetensors")
    result = shell("rank", *arguments)
    assert (result.code, Path("ranking.json").exists()) == (3, False)
    assert said in result.err


def test_embed_says_that_they_need_no_store(states: States, shell: Shell) -> None:
    result = shell("embed", "states")
    assert result.code == 3
    assert "state dicts but no expert" in result.err
    assert "pimerge rank --target states/NAME.safetensors" in result.err
