"""The road with bases that answer in text about images: tasks of images, of texts and of both in one pool."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from pimerge.adapters.expert import open_expert
from tests.support.bases import model_for
from tests.support.cli import Shell
from tests.support.experts import MakeExpert
from tests.support.tasks import write_image_text_task

Scans = tuple[list[Any], list[int]]
TASKS: dict[str, dict[str, Any]] = {
    "parity": {},
    "seen": {"prompt": "?"},
    "told": {"columns": {"label": "parity"}, "prompt": "the {{ name }} {{ words }}:"},
    "caption": {"labels": None, "columns": {"image": "scan"}, "answer": "{{ name }}", "max_new_tokens": 3},
}


LINES = (
    "embed experts",
    "rank --target parity -k 2 --shots 3 --no-gate",
    "merge --method uniform",
    "tune --method uniform --output mean --shots 2",
    "tune --method interpolated --epochs 1 --shots 2 --output pi",
    "rank --target told --measure marginals --no-gate --output by-store.json",
    "inspect experts",
    "tune --method learned --epochs 1 --shots 2",
    "rank --target caption --output free.json",
    "embed experts/parity experts/told --labels sampled --store sampled.json",
    "eval experts/caption --target experts/caption",
)


@pytest.mark.parametrize(("base", "kind"), [("florence2", "lora"), ("florence2", "bottleneck"), ("llava", "lora")])
def test_the_lines_run_one_after_the_other(
    shell: Shell,
    tmp_path: Path,
    scans: Scans,
    make_expert: MakeExpert,
    image_text_base: Callable[[str], Path],
    base: str,
    kind: str,
) -> None:
    config = {"init_weights": False} if kind == "bottleneck" else {}
    if (base, kind) == ("florence2", "lora"):  # as others train such experts; pimerge names no task type
        config["task_type"] = "SEQ_2_SEQ_LM"
    for seed, (name, fields) in enumerate(TASKS.items()):
        task = write_image_text_task(tmp_path / "tasks" / name, scans, **fields)
        make_expert(tmp_path / "experts" / name, image_text_base(base), task, seed=seed, kind=kind, **config)
    for line in LINES if (base, kind) == ("florence2", "lora") else LINES[:6]:
        result = shell(*line.split())
        assert result.code == 0, (line, result.err)
    result = shell("eval", "merged", "mean", "pi", "--json")
    by_name = {row["name"]: row for row in result.document["scores"]}
    assert list(by_name) == ["(base)", "merged", "mean", "pi"]
    assert by_name["mean"]["loss"] == pytest.approx(by_name["merged"]["loss"], rel=1e-4)
    assert json.loads((tmp_path / "merged" / "task.json").read_text())["columns"]["image"] == "scan"
    assert open_expert(tmp_path / "pi").head == {}
    PeftModel.from_pretrained(model_for(image_text_base(base)), tmp_path / "pi")


def test_a_base_of_another_type_is_an_error(
    shell: Shell, tmp_path: Path, scans: Scans, bert_base: Path, language_base: Callable[[str], Path]
) -> None:
    task = write_image_text_task(tmp_path / "task", scans)
    for base in (bert_base, language_base("t5")):
        result = shell("tune", "--method", "scratch", "--target", task, "--base", base, "--output", "x")
        assert result.code == 3
        assert "cannot be loaded for image-text-to-text" in result.err
        assert not (tmp_path / "x").exists()
