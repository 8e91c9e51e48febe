"""Names of classes as examples: what they are, when they are taken, and that they are examples like others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pimerge.checkpoints.base import find_base
from pimerge.core.errors import PimergeError
from pimerge.evaluation.design import usual_controls
from pimerge.tasks.examples import Examples
from pimerge.tasks.task import Task, open_task
from pimerge.tuning.class_name_examples import class_names, class_texts, names_predict
from pimerge.tuning.fit import with_class_names_decided
from pimerge.tuning.method import MixturePlan
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.session import TuneRequest, TuningSession, open_session
from tests.support.tasks import write_json
from tests.support.tuning import tune

QUICK = TrainingOptions(epochs=2, shots=4, batch_size=4, lr=1e-2, holdout=0.0)
Row = Mapping[str, Any]


def task_of(folder: Path, rows: list[Row], labels: list[str], **fields: Any) -> Task:
    """A text task with these rows, for training and for tests."""
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": "rows.jsonl", "test": "rows.jsonl"}
    write_json(folder / "task.json", {"type": "text-classification", "data": data, "labels": labels, **fields})
    return open_task(folder)


def session_of(base: Path, task: Task) -> TuningSession:
    return open_session(task, find_base(str(base), None, base), "cpu")


def request_of(
    session: TuningSession, run: Path, options: TrainingOptions = QUICK, notes: list[str] | None = None
) -> TuneRequest:
    heard = [] if notes is None else notes
    return TuneRequest(session, [], None, None, None, options, run, note=heard.append)


def tokens(examples: Examples) -> list[tuple[list[int], int]]:
    found = [examples.get(index) for index in range(len(examples))]
    return [(each["input_ids"].tolist(), int(each["labels"])) for each in found]


@pytest.mark.parametrize(
    ("labels", "texts"),
    [
        (["dog", "cat"], ["dog", "cat"]),
        (["text-mode", "not_a  dog"], ["text mode", "not a dog"]),
        (["Sci/Tech", "World 2"], ["Sci/Tech", "World 2"]),
        (["Tiere 🐈", "Häuser"], ["Tiere 🐈", "Häuser"]),
        (["c", "c++", "java", "perl"], ["c", "c++", "java", "perl"]),
        (["0", "1"], []),
        (["LABEL_0", "LABEL_1"], []),
        (["a", "b"], []),
        (["dog", "1"], []),
    ],
)
def test_names_that_are_words_are_texts(tmp_path: Path, labels: list[str], texts: list[str]) -> None:
    rows = [{"text": "cat", "label": 0}]
    assert class_texts(task_of(tmp_path / "task", rows, labels)) == texts


def test_pairs_and_images_have_no_class_that_is_one_of_their_texts(tmp_path: Path, parity_task: Path) -> None:
    rows = [{"text": "cat", "text_pair": "dog", "label": 0}]
    columns = {"text_pair": "text_pair"}
    assert class_texts(task_of(tmp_path / "pairs", rows, ["same", "other"], columns=columns)) == []
    assert class_texts(open_task(parity_task)) == []


def test_they_are_encoded_as_texts_of_their_classes(tmp_path: Path, bert_base: Path) -> None:
    rows = [{"what": "cat", "label": 0}]
    session = session_of(bert_base, task_of(tmp_path / "task", rows, ["cat-dog", "dog"], columns={"text": "what"}))
    encoded = class_names(session.task, session.loaded.processor, session.loaded.config)
    expected = session.loaded.processor(["cat dog", "dog"])["input_ids"]
    assert tokens(encoded) == [(expected[0], 0), (expected[1], 1)]


@pytest.mark.parametrize(("labels", "predicted"), [(["dog", "cat"], True), (["cat", "dog"], False)])
def test_they_predict_texts_like_them_and_not_texts_of_another_class(
    tmp_path: Path, bert_base: Path, labels: list[str], predicted: bool
) -> None:
    rows = [{"text": "dog dog", "label": 0}, {"text": "cat cat", "label": 1}] * 4
    session = session_of(bert_base, task_of(tmp_path / "task", rows, labels))
    examples, _ = request_of(session, tmp_path).examples()
    assert names_predict(session.loaded, session.task, examples) is predicted
    notes: list[str] = []
    assert (
        with_class_names_decided(
            request_of(session, tmp_path, notes=notes), MixturePlan(class_names=True)
        ).options.class_names
        is predicted
    )
    assert len(notes) == predicted


def test_who_asks_for_them_or_not_is_obeyed(tmp_path: Path, bert_base: Path, vit_base: Path, parity_task: Path) -> None:
    rows = [{"text": "dog dog", "label": 0}, {"text": "cat cat", "label": 1}] * 4
    session = session_of(bert_base, task_of(tmp_path / "task", rows, ["cat", "dog"]))
    with_names, without = (request_of(session, tmp_path, replace(QUICK, class_names=wish)) for wish in (True, False))
    assert with_class_names_decided(with_names, MixturePlan()).options.class_names is True
    assert with_class_names_decided(without, MixturePlan(class_names=True)).options.class_names is False
    assert with_class_names_decided(request_of(session, tmp_path), MixturePlan()).options.class_names is False
    images = request_of(session_of(vit_base, open_task(parity_task)), tmp_path)
    assert with_class_names_decided(images, MixturePlan(class_names=True)).options.class_names is False
    with pytest.raises(PimergeError, match="have no names that are texts"):
        with_class_names_decided(replace(images, options=replace(QUICK, class_names=True)), MixturePlan())


def test_they_are_never_held_out(tmp_path: Path, bert_base: Path, text_task: Path) -> None:
    session = session_of(bert_base, open_task(text_task))
    plain, held_out = request_of(session, tmp_path, replace(QUICK, holdout=0.25, class_names=False)).examples()
    more, held_out_of_more = request_of(session, tmp_path, replace(QUICK, holdout=0.25, class_names=True)).examples()
    names = tokens(class_names(session.task, session.loaded.processor, session.loaded.config))
    assert tokens(more) == tokens(plain) + names
    assert held_out is not None
    assert held_out_of_more is not None
    assert tokens(held_out) == tokens(held_out_of_more)
    of_a_fold = replace(request_of(session, tmp_path, replace(QUICK, class_names=True)), fold=(0, 4))
    kept, held_out = of_a_fold.examples()
    assert held_out is not None
    assert (len(kept), len(held_out)) == (6 + 2, 2)


@pytest.mark.parametrize("method", ["named", "full", "head"])
def test_training_with_them_is_training_on_rows_of_them(
    tmp_path: Path, bert_base: Path, text_task: Path, method: str
) -> None:
    """The same bytes as from a data file that has the names as its last rows."""
    base, task = find_base(str(bert_base), None, bert_base), open_task(text_task)
    rows = [json.loads(line) for line in (text_task / "train.jsonl").read_text().splitlines()]
    written = task_of(
        tmp_path / "written", [*rows, {"text": "dog", "label": 0}, {"text": "cat", "label": 1}], task.labels
    )
    options = replace(QUICK, shots=None)
    tune(method, task, base, [], None, tmp_path / "found", replace(options, class_names=True))
    tune("scratch" if method == "named" else method, written, base, [], None, tmp_path / "expected", options)
    found, expected = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("found", "expected")
    )
    assert found == expected != {}
    manifest = json.loads((tmp_path / "found" / "pimerge.json").read_text())
    assert manifest["options"]["class_names"] is True
    assert manifest["results"]["train_examples"] == 42


def test_examples_joined_are_one_after_the_other(bert_base: Path, text_task: Path) -> None:
    session = session_of(bert_base, open_task(text_task))
    examples, _ = session.task.examples("train", session.loaded.processor, session.loaded.config, shots=2)
    names = class_names(session.task, session.loaded.processor, session.loaded.config)
    both = examples.joined(names)
    assert tokens(both) == tokens(examples) + tokens(names)
    assert list(both.lengths) == [len(ids) for ids, _ in tokens(both)]
    assert both.batch([5, 0])["labels"].tolist() == [1, tokens(examples)[0][1]]


def test_a_fresh_lora_with_names_is_a_control_where_a_method_takes_them(text_task: Path, parity_task: Path) -> None:
    usual = ["head", "scratch", "full", "single", "uniform"]
    assert usual_controls(open_task(text_task), ["guided"]) == [*usual, "named"]
    assert usual_controls(open_task(text_task), ["learned", "single"]) == usual
    assert usual_controls(open_task(parity_task), ["guided"]) == usual
