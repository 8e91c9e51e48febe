"""The function ``pimerge.merge``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pimerge
from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.ranking_document import Candidate, Ranking, Target, read_ranking
from pimerge.core.errors import AlreadyDone, PimergeError
from pimerge.merging.merged_updates import MergedUpdates
from tests.support.bases import model_for
from tests.support.cli import Cli
from tests.support.experts import dense_deltas, raw_expert, set_config, updates_of
from tests.support.numerics import logits_of, normal

BATCH = {"pixel_values": normal(2, 3, 16, 16)}


def means(pair: dict[str, Expert]) -> dict[str, torch.Tensor]:
    """(ΔW_a + ΔW_b) / 2."""
    a, b = map(dense_deltas, pair.values())
    return {name: (a[name] + b[name]) / 2 for name in a}


def test_it_writes_what_the_command_writes(cli: Cli, pair: dict[str, Expert]) -> None:
    given = ["--method", "ties", "--density", "0.3", "--head", "average", "--json", "-q"]
    document = json.loads(cli("merge", "experts/a", "experts/b", *given, "-o", "by-command").stdout)
    merged = pimerge.merge(
        ["experts/a", Path("experts/b")], method="ties", density=0.3, head="average", output="by-function"
    )
    assert merged.path == Path("by-function")
    assert {**merged.to_dict(), "output": "by-command"} == document
    for file in merged.path.iterdir():
        assert file.read_bytes() == Path("by-command", file.name).read_bytes()


def test_open_experts_are_taken_as_they_were_opened(cli: Cli, pair: dict[str, Expert]) -> None:
    pimerge.merge([pair["a"], pair["b"].with_strength(0.5)], head="none")
    a, b = map(dense_deltas, pair.values())
    for name, delta in dense_deltas(open_expert("merged")).items():
        torch.testing.assert_close(delta, (a[name] + 0.5 * b[name]) / 2, rtol=0, atol=1e-6)


def test_a_ranking_says_which_experts(cli: Cli, pair: dict[str, Expert], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = ({"name": name, "path": f"experts/{name}", "sha256": pair[name].sha256} for name in "ab")
    ranking = Ranking(
        target=Target(**a),
        measure="fisher",
        k=1,
        selected=["b"],
        why="by hand",
        candidates=[Candidate(**b, score=1.0, low=0.0, high=2.0)],
        not_comparable=[],
    )
    ranking.save("ranking.json")
    found = read_ranking(Path("ranking.json").resolve())
    assert pimerge.merge(ranking, output=None).to_dict()["experts"][0]["name"] == "b"
    other = Path("elsewhere")
    other.mkdir()
    monkeypatch.chdir(other)
    joined = pimerge.merge(found, method="interpolated", output=None)
    assert [expert["name"] for expert in joined.plan["experts"]] == ["a", "b"]


def test_without_an_output_nothing_is_written_until_it_is_saved(
    cli: Cli, pair: dict[str, Expert], vit_base: Path
) -> None:
    before = sorted(Path().rglob("*"))
    merged = pimerge.merge(list(pair.values()), target="experts/a", output=None)
    loaded = logits_of(merged.load(model_for(vit_base)).eval(), BATCH)
    assert sorted(Path().rglob("*")) == before
    assert (merged.path, merged.to_dict()["output"], merged.to_dict()) == (None, None, merged.plan)
    assert merged.save("out") == Path("out")
    assert merged.to_dict()["output"] == "out"
    torch.testing.assert_close(logits_of(merged.load(model_for(vit_base)).eval(), BATCH), loaded)
    with pytest.raises(AlreadyDone, match="'out' is there already"):
        merged.save("out")
    with pytest.raises(PimergeError, match="'out' already exists"):
        pimerge.merge(list(pair.values()), target="experts/b", output="out")
    merged.save("out", force=True)
    with pytest.raises(PimergeError, match="'experts' is the expert 'a' or contains it"):
        merged.save("experts", force=True)
    found = dense_deltas(open_expert("out"))
    for name, delta in means(pair).items():
        torch.testing.assert_close(found[name], delta, rtol=0, atol=1e-6)


def test_modules_are_computed_one_by_one(cli: Cli, pair: dict[str, Expert]) -> None:
    merged = pimerge.merge(list(pair.values()), head="none", output=None)
    assert isinstance(merged, MergedUpdates)
    expected = means(pair)
    for name in merged.merge.names:
        factors = merged.merge.module(name).factors
        torch.testing.assert_close(factors.B.double() @ factors.A.double(), expected[name], rtol=0, atol=1e-6)


def test_a_full_checkpoint_is_not_loaded_as_an_adapter(cli: Cli, pair: dict[str, Expert], vit_base: Path) -> None:
    merged = pimerge.merge(list(pair.values()), head="none", into=vit_base, output=None)
    with pytest.raises(PimergeError, match="not an adapter"):
        merged.load(model_for(vit_base))


def test_all_wrong_choices_are_said_at_once() -> None:
    with pytest.raises(PimergeError) as caught:
        pimerge.merge(["a"], space="dense", head="mean", dtype="int8")
    flags = [problem.message.partition(" ")[0] for problem in caught.value.problems]
    assert flags == ["--space", "--head", "--dtype"]
    with pytest.raises(PimergeError, match="--rank is 'three'"):
        pimerge.merge(["a"], rank="three")


@pytest.mark.parametrize("name", [None, "", "/root/models/llama", "C:\\models\\llama", "../gone"])
def test_a_merge_needs_no_base(name: str | None, tmp_path: Path) -> None:
    a, b = (
        raw_expert(tmp_path / str(seed), updates_of({"q": (4, 2, 5)}, seed), base_model_name_or_path=name)
        for seed in range(2)
    )
    notes: list[str] = []
    merged = pimerge.merge([a, b], output=tmp_path / "merged", note=notes.append)
    config = json.loads((tmp_path / "merged/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (name or None)
    assert any("a merge does not need it" in note for note in notes)
    one, two, both = (dense_deltas(open_expert(folder))["q"] for folder in (a, b, merged.path))
    torch.testing.assert_close(both, (one + two) / 2, rtol=0, atol=1e-6)
    set_config(b, base_model_name_or_path="/elsewhere/other")
    with pytest.raises(PimergeError, match=r"which is another model\n.*--base"):
        pimerge.merge([a, b], output=None)
