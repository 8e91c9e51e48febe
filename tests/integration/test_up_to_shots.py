"""A class with fewer examples than were asked for, at every stage that samples."""

from __future__ import annotations

from pathlib import Path

import pytest

import pimerge
from pimerge.core.errors import PimergeError
from pimerge.tuning.options import TrainingOptions
from tests.support.experts import MakeExpert
from tests.support.tasks import write_json
from tests.support.text_rows import write_lines

FEW = [{"text": f"the {'cat' if index % 4 else 'dog'} {index}", "label": int(index % 4 > 0)} for index in range(16)]


def test_up_to_shots_takes_what_there_is(
    make_expert: MakeExpert, bert_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        make_expert(tmp_path / name, bert_base, seed=seed)
        write_lines(tmp_path / name / "d.jsonl", FEW)
        data = {"train": "d.jsonl", "test": "d.jsonl"}
        write_json(
            tmp_path / name / "task.json", {"type": "text-classification", "data": data, "labels": ["dog", "cat"]}
        )
    few = "1 of 2 classes have too few examples, 6 were asked for: 'dog' \\(4\\)"
    with pytest.raises(PimergeError, match=few):
        pimerge.embed(["a", "b"], shots=6)
    embedded = pimerge.embed(["a", "b"], shots=6, up_to_shots=True)
    assert [entry.examples for entry in embedded.experts.values()] == [10, 10]
    with pytest.raises(PimergeError, match=few):
        pimerge.rank("a", k=1, shots=6)
    ranking = pimerge.rank("a", k=1, shots=6, up_to_shots=True, gate=False)
    brief = TrainingOptions(epochs=1, shots=6)
    with pytest.raises(PimergeError, match=few):
        pimerge.tune(ranking, method="learned", options=brief)
    assert pimerge.tune(ranking, method="learned", options=brief, up_to_shots=True).output.is_dir()
    quick = {"seeds": 1, "epochs": 1, "methods": ["learned"], "controls": ["head"], "counts": [1]}
    with pytest.raises(PimergeError, match="--up-to-shots"):
        pimerge.compare("a", experts=["b"], shots=[6], rank_by="ranking", **quick)
    found = pimerge.compare("a", experts=["b"], shots=[6], up_to_shots=True, rank_by="ranking", **quick)
    assert found is not None
    assert {run.shots for run in found.document.runs} == {6}
