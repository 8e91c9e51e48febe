"""Experts of different kinds for one base: in one store, compared where a measure does not look at their tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from pimerge.embedding.store import Store
from tests.support.experts import KINDS, MakeExpert
from tests.support.numerics import relative_difference

Run = Callable[..., Any]
ALL = ("lora", *KINDS)


@pytest.fixture
def pool(make_expert: MakeExpert, bert_base: Path, text_task: Path, tmp_path: Path, cli: Run) -> Path:
    for kind in ALL:
        for seed in range(2):
            make_expert(tmp_path / "experts" / f"{kind}{seed}", bert_base, text_task, kind=kind, seed=seed)
    assert cli("embed").exit_code == 0
    return tmp_path


def ranked(cli: Run, pool: Path, *arguments: str) -> dict[str, Any]:
    result = cli("rank", *arguments, "--no-gate", "--force", "--json")
    assert result.exit_code == 0, result.exception
    document: dict[str, Any] = json.loads((pool / "ranking.json").read_text())
    return document


def test_by_layers_all_kinds_compare_and_by_tensors_one_kind_does(pool: Path, cli: Run) -> None:
    store = Store(pool / "embeddings.json")
    layers = {f"bert.encoder.layer.{n}.attention.self.{part}" for n in (0, 1) for part in ("query", "value")}
    for name in store.experts:
        file = store.second_moments_file(name)
        seen = {key.partition(".")[2] for key in file.entries if key.startswith("output.")}
        assert seen == layers, name  # every layer, also where nothing trains before it
        assert all(bool(file.read(f"gradient.{layer}").any()) for layer in layers)
        assert store.experts[name].route == "rules"
    for measure in ("fisher", "marginals"):
        for target in ("lora0", "bottleneck0", "prefix0"):
            document = ranked(cli, pool, "--target", target, "--measure", measure, "-k", "9")
            assert len(document["candidates"]) == len(store.experts) - 1
            assert all(torch.tensor(candidate["score"]).isfinite() for candidate in document["candidates"])
            chosen = [name.rstrip("01") for name in document["selected"]]
            assert len(set(chosen)) == 1
    for measure in ("fisher-raw", "task2vec", "parameters"):
        for kind in ALL:
            document = ranked(cli, pool, "--target", f"{kind}0", "--measure", measure)
            assert [candidate["name"] for candidate in document["candidates"]] == [f"{kind}1"]
            assert "its kind is" in document["not_comparable"][0]["reason"]


def test_a_task_alone_starts_as_the_kind_that_most_have(
    pool: Path, make_expert: MakeExpert, bert_base: Path, text_task: Path, cli: Run, tmp_path: Path
) -> None:
    make_expert(tmp_path / "experts" / "ia32", bert_base, text_task, kind="ia3", seed=2)
    assert cli("embed").exit_code == 0
    line = ("rank", "--target", str(text_task), "--measure", "fisher", "--shots", "4", "--no-gate")
    found = cli(*line, "--force")
    assert found.exit_code == 0, found.exception
    assert "the init of the pool's most frequent kind, ia3" in " ".join(found.stderr.split())
    document = json.loads((pool / "ranking.json").read_text())
    assert len(document["candidates"]) == 2 * len(ALL) + 1
    assert any("at the pool's init of the kind ia3" in note for note in document["notes"])
    assert any("have no ΔW, so all were compared by their gradients alone" in note for note in document["notes"])
    trained = cli(*line, "--train-target", "--force")
    assert trained.exit_code == 0, trained.exception
    assert open_expert(pool / "targets" / text_task.name).kind == "ia3"
    document = ranked(cli, pool, "--target", "ia30", "--measure", "parameters", "-k", "3")
    assert {candidate["name"] for candidate in document["candidates"]} == {"ia31", "ia32", text_task.name}


def test_what_needs_an_update_says_so(pool: Path, cli: Run) -> None:
    for measure in ("delta", "fisher-factors"):
        result = cli("rank", "--target", "ia30", "--measure", measure)
        assert isinstance(result.exception, PimergeError)
        assert "has none" in str(result.exception)


def test_by_examples_every_kind_is_tried(pool: Path, cli: Run) -> None:
    document = ranked(cli, pool, "--target", "lora0", "--measure", "label-cka", "-k", "3")
    scales = {candidate["name"]: candidate["scale"] for candidate in document["candidates"]}
    assert len(scales) == 2 * len(ALL) - 1
    assert all(scales[f"{kind}{n}"] == 1 for kind in ("prefix", "prompt") for n in (0, 1))


def test_padding_and_virtual_tokens_leave_marginals_as_they_are(pool: Path, cli: Run) -> None:
    before = {
        name: Store(pool / "embeddings.json").second_moments_file(name) for name in ("prompt0", "prefix0", "ia30")
    }
    found = {name: {key: file.read(key) for key in file.entries} for name, file in before.items()}
    assert cli("embed", "--force", "--batch-tokens", "1").exit_code == 0
    for name, tensors in found.items():
        again = Store(pool / "embeddings.json").second_moments_file(name)
        for key, tensor in tensors.items():
            assert relative_difference(again.read(key), tensor) < 1e-4, (name, key)
