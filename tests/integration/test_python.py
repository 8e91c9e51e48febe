"""The pipeline in Python with rows in memory: what one function returns, the next one takes."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

import pimerge
from tests.support.experts import MakeExpert


def test_each_function_takes_what_the_one_before_returned(
    tmp_path: Path, make_expert: MakeExpert, bert_base: Path, text_task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("a", "b", "c")):
        make_expert(tmp_path / "experts" / name, bert_base, text_task, seed=seed)
    monkeypatch.chdir(tmp_path)
    splits = {split: Dataset.from_json(str(text_task / f"{split}.jsonl")) for split in ("train", "test")}
    task = pimerge.Task.from_rows(splits, labels=["dog", "cat"], name="reviews")
    pimerge.embed("experts", examples=8)
    ranking = pimerge.rank(task, k=2, gate=False)
    assert ranking.target.name == "reviews"
    merged = pimerge.merge(ranking, head="none")
    tuned = pimerge.tune(ranking, method="learned", epochs=2, holdout=0.0)
    assert set(tuned.experts) == set(ranking.selected)
    for source in ({"target": task}, {"ranking": ranking}):
        assert [score.name for score in pimerge.evaluate([tuned], **source)][-1] == "tuned"
    again = pimerge.merge(ranking, target=task, head="none", output="again")
    assert again.to_dict()["weights"] == merged.to_dict()["weights"]
    base = AutoModelForSequenceClassification.from_pretrained(bert_base, num_labels=len(task.labels))
    for result in (merged, tuned):
        assert type(result.load(deepcopy(base))).__name__.startswith("PeftModel")


def test_one_expert_needs_no_list_and_an_empty_list_is_refused(
    tmp_path: Path, make_expert: MakeExpert, bert_base: Path, text_task: Path
) -> None:
    folder = make_expert(tmp_path / "a", bert_base, text_task)
    alone = pimerge.merge(str(folder), output=tmp_path / "by-path")
    opened = pimerge.merge(pimerge.open_expert(folder), output=tmp_path / "open")
    assert alone.to_dict()["weights"] == opened.to_dict()["weights"]
    for function in (pimerge.embed, pimerge.merge, pimerge.tune, pimerge.compare):
        keywords = {"target": text_task} if function is pimerge.compare else {}
        with pytest.raises(pimerge.PimergeError, match="the list of experts is empty"):
            function(experts=[], **keywords)
