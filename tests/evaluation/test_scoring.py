"""Scores against a plain loop over the test split with PEFT's own model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn

from pimerge.adapters.expert import Expert, open_expert
from pimerge.checkpoints.base import find_base
from pimerge.core.errors import PimergeError
from pimerge.evaluation import scoring
from pimerge.evaluation.scoring import BASE, Score, score_experts, wilson_interval
from pimerge.models.heads import set_head
from pimerge.tasks.intervals import Interval, bootstrap_interval
from pimerge.tasks.metric import Answers
from pimerge.tasks.task import open_task
from tests.support.bases import model_for
from tests.support.experts import MakeExpert
from tests.support.tasks import write_image_task, write_json, write_text_task


def by_loop(model: nn.Module, folder: Path, base: Path) -> tuple[int, list[float]]:
    """How many answers are right, and −log p(y|x) of each example of the test split."""
    task = open_task(folder)
    examples, labels = task.examples("test", task.type.load_processor(str(base), None), model.config)
    right, losses = 0, []
    for index, label in enumerate(labels):
        batch = examples.batch([index])
        del batch["labels"]
        with torch.no_grad():
            answer = model(**batch).logits[0]
        right += int(answer.argmax()) == label
        losses.append(-float(answer.log_softmax(0)[label]))
    return right, losses


def assert_scored(score: Score, right: int, losses: list[float]) -> None:
    total = len(losses)
    mean = sum(losses) / total
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (total - 1))
    half = 1.959963984540054 * deviation / math.sqrt(total)
    assert score.examples == total
    assert score.accuracy == pytest.approx(right / total)
    assert score.loss == pytest.approx(mean, rel=1e-5)
    assert (score.loss_low, score.loss_high) == pytest.approx((mean - half, mean + half), rel=1e-5)
    assert (score.accuracy_low, score.accuracy_high) == pytest.approx(wilson_by_bisection(right, total), abs=1e-9)


def wilson_by_bisection(right: int, total: int) -> tuple[float, float]:
    """The two shares p at which (p̂ − p)² = z² p (1 − p) / n, searched for on both sides of p̂."""
    share, z = right / total, 1.959963984540054

    def search(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            if (share - middle) ** 2 > z**2 * middle * (1 - middle) / total:
                outside = middle
            else:
                inside = middle
        return inside

    return search(share, 0.0), search(share, 1.0)


@pytest.mark.parametrize(("right", "total"), [(0, 7), (7, 7), (8, 10), (1, 3), (500, 1000), (999, 1000), (0, 1)])
def test_the_interval_is_wilsons(right: int, total: int) -> None:
    low, high = wilson_interval(right, total)
    assert (low, high) == pytest.approx(wilson_by_bisection(right, total), abs=1e-9)
    assert 0 <= low < high <= 1


@pytest.fixture(scope="module")
def pool(
    tmp_path_factory: pytest.TempPathFactory,
    make_expert: MakeExpert,
    vit_base: Path,
    bert_base: Path,
    parity_task: Path,
    text_task: Path,
) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    for seed, name in enumerate(("x", "a")):
        make_expert(folder / name, vit_base, parity_task, seed=seed)
        make_expert(folder / f"text-{name}", bert_base, text_task, seed=seed)
    return folder


def scores_of(experts: list[Expert], target: Expert | None = None, **options: Any) -> dict[str, Score]:
    task = open_task((target or experts[0]).path)
    found = score_experts(experts, task, experts[0].base, target, device="cpu", **options)
    assert len({score.name for score in found}) == len(found)
    return {score.name: score for score in found}


@pytest.mark.parametrize("prefix", ["", "text-"])
@pytest.mark.parametrize("batch_tokens", [1, 16_384])
def test_scores_are_those_of_a_plain_loop(
    pool: Path, prefix: str, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "BATCH_TOKENS", batch_tokens)
    experts = [open_expert(pool / f"{prefix}{name}") for name in ("x", "a")]
    found = scores_of(experts, experts[0])
    assert list(found) == [BASE, f"{prefix}x", f"{prefix}a"]
    base = Path(experts[0].base.source)
    for expert in experts:
        model = PeftModel.from_pretrained(model_for(base), expert.path).eval()
        assert_scored(found[expert.name], *by_loop(model, experts[0].path, base))
        assert found[expert.name].note == ""


def test_the_base_answers_with_the_head_of_the_targets_expert(pool: Path, vit_base: Path) -> None:
    x, a = open_expert(pool / "x"), open_expert(pool / "a")
    score = scores_of([a], x)[BASE]
    model = model_for(vit_base)
    set_head(model, x.head_tensors())
    assert_scored(score, *by_loop(model, x.path, vit_base))
    assert score.note == "the head of x"


def test_the_base_answers_with_its_own_head_if_that_is_for_these_labels(
    pool: Path, vit_base: Path, tmp_path: Path
) -> None:
    names = {0: "even", 1: "odd"}
    model = transformers.AutoModelForImageClassification.from_pretrained(vit_base, id2label=names).eval()
    model.save_pretrained(tmp_path)
    transformers.AutoImageProcessor.from_pretrained(vit_base).save_pretrained(tmp_path)
    x = open_expert(pool / "x", str(tmp_path))
    scores = {score.name: score for score in score_experts([x], open_task(x.path), x.base, x, device="cpu")}
    assert scores[BASE].note == "its own head"
    assert_scored(scores[BASE], *by_loop(model, x.path, vit_base))


def test_without_any_head_the_base_has_no_row(pool: Path) -> None:
    assert list(scores_of([open_expert(pool / "x")])) == ["x"]


def test_the_base_alone_can_be_scored(pool: Path) -> None:
    x = open_expert(pool / "x")
    assert [score.name for score in score_experts([], open_task(x.path), x.base, x, device="cpu")] == [BASE]


def test_all_experts_that_cannot_answer_are_named_at_once(
    pool: Path,
    make_expert: MakeExpert,
    vit_base: Path,
    scans: tuple[list[Any], list[int]],
    tmp_path: Path,
) -> None:
    task = write_image_task(tmp_path / "swapped", scans[0][:20], [0, 1] * 10, ["odd", "even"])
    x = open_expert(pool / "x")
    experts = [
        open_expert(make_expert(tmp_path / "other-labels", vit_base, task)),
        open_expert(make_expert(tmp_path / "headless", vit_base, head=False)),
        open_expert(pool / "text-x"),
    ]
    with pytest.raises(PimergeError) as caught:
        score_experts([*experts, x], open_task(x.path), x.base, x, device="cpu")
    message = str(caught.value)
    assert "'other-labels': its head answers odd, even, the task asks for even, odd" in message
    assert "'headless' has no head" in message
    assert "'text-x': its base is" in message
    assert "'x'" not in message


def test_a_target_whose_head_answers_other_labels_lends_it_to_nobody(
    pool: Path, make_expert: MakeExpert, vit_base: Path, scans: tuple[list[Any], list[int]], tmp_path: Path
) -> None:
    task = write_image_task(tmp_path / "swapped", scans[0][:20], [0, 1] * 10, ["odd", "even"])
    target = open_expert(make_expert(tmp_path / "target", vit_base, task))
    x = open_expert(pool / "x")
    assert [score.name for score in score_experts([x], open_task(x.path), x.base, target, device="cpu")] == ["x"]


def test_the_order_and_the_company_of_experts_change_nothing(pool: Path) -> None:
    x, a = open_expert(pool / "x"), open_expert(pool / "a")
    together = scores_of([x, a], x)
    assert scores_of([a, x], x) == together
    assert scores_of([a], x)["a"] == together["a"]


def test_a_task_without_a_test_split_says_so(pool: Path, tmp_path: Path) -> None:
    x = open_expert(pool / "x")
    document = open_task(x.path).document_for(tmp_path)
    write_json(tmp_path / "task.json", {**document, "data": {"train": document["data"]["train"]}})
    with pytest.raises(PimergeError, match=r"the split 'test' of .* cannot be read"):
        score_experts([x], open_task(tmp_path), x.base, x, device="cpu")


def test_an_expert_that_answers_nan_is_named(
    pool: Path, make_expert: MakeExpert, vit_base: Path, tmp_path: Path
) -> None:
    from tests.support.experts import edit_tensors

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.classifier.bias"].fill_(math.nan)

    broken = open_expert(edit_tensors(make_expert(tmp_path / "broken", vit_base), spoil))
    x = open_expert(pool / "x")
    with pytest.raises(PimergeError, match="'broken'"):
        score_experts([broken], open_task(x.path), find_base(str(vit_base), None, vit_base), x, device="cpu")


@pytest.mark.parametrize("name", ["bart", "qwen2-lm"])
def test_answers_in_text_are_scored_by_the_tasks_metrics(
    name: str, tmp_path: Path, make_expert: MakeExpert, language_base: Callable[[str], Path]
) -> None:
    base = language_base(name)
    metrics = ["exact-match", "token-f1", "rouge-l", "bleu", "cider"]
    fields = {"labels": None, "columns": {}, "answer": "{{ words }}", "max_new_tokens": 5, "metrics": metrics}
    task = open_task(write_text_task(tmp_path / "task", name, **fields))
    expert = open_expert(make_expert(tmp_path / "x", base, tmp_path / "task"))
    notes: list[str] = []
    bare, own = score_experts([expert], task, find_base(str(base), None, base), None, device="cpu", note=notes.append)
    assert (bare.name, bare.note) == (BASE, "")
    model = PeftModel.from_pretrained(model_for(base), expert.path).eval()
    examples, _ = task.examples("test", task.type.load_processor(str(base), None), model.config)
    answers = [task.type.score(model, examples, [index]) for index in range(len(examples))]
    texts = [answer.texts[0] for answer in answers]
    assert own.loss == pytest.approx(sum(float(answer.losses) for answer in answers) / len(answers), rel=1e-5)
    assert list(own.metrics) == metrics
    expected = Answers([None] * len(texts), [0] * len(texts), 0, texts, examples.references)
    for metric, interval in own.metrics.items():
        assert interval == bootstrap_interval(metric, expected)
    cut = [row for row, answer in enumerate(answers) if any(answer.cut)]
    told = f"{own.name}: {len(cut)} answers were cut at max_new_tokens, in rows {', '.join(map(str, cut[:5]))}"
    assert any(note.startswith(told) for note in notes) == bool(cut)


def test_classes_have_accuracy_by_wilson_and_macro_f1(
    tmp_path: Path, make_expert: MakeExpert, bert_base: Path, text_task: Path
) -> None:
    expert = make_expert(tmp_path / "x", bert_base, text_task)
    document = json.loads((expert / "task.json").read_text()) | {"metrics": ["macro-f1", "accuracy"]}
    write_json(expert / "task.json", document)
    opened = open_expert(expert)
    (found,) = score_experts(
        [opened], open_task(expert), find_base(str(bert_base), None, bert_base), None, device="cpu"
    )
    assert list(found.metrics) == ["macro-f1", "accuracy"]
    assert found.metrics["accuracy"] == Interval(found.accuracy, found.accuracy_low, found.accuracy_high)
    assert 0 < found.metrics["macro-f1"].value <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ["acuracy"]}, "did you mean 'accuracy'"),
        ({"metrics": ["bleu", "bleu"]}, "'bleu' is named twice"),
        ({"metrics": ["accuracy"], "labels": None, "columns": {}, "answer": "x"}, "the task has no labels"),
    ],
)
def test_metrics_that_do_not_fit_the_task_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match=message):
        open_task(write_text_task(tmp_path / "task", "t5", **fields))


def test_a_classification_has_no_texts_for_a_metric(text_task: Path, tmp_path: Path) -> None:
    document = json.loads((text_task / "task.json").read_text()) | {"metrics": ["rouge-l"]}
    write_json(tmp_path / "task.json", document)
    with pytest.raises(PimergeError, match="'rouge-l' is about texts, and the task is not answered in text"):
        open_task(tmp_path)


def test_the_bare_base_takes_no_more_than_the_head_of_the_target(
    make_expert: MakeExpert, vit_base: Path, parity_task: Path, tmp_path: Path
) -> None:
    """What else the target saved would stay in the base for all that is scored after."""
    saved = ["classifier", "layernorm_before"]
    plain = open_expert(make_expert(tmp_path / "plain", vit_base, parity_task))
    target = open_expert(make_expert(tmp_path / "x", vit_base, parity_task, modules_to_save=saved))
    task = open_task(parity_task)
    alone = score_experts([plain], task, plain.base, None)
    bare, beside = score_experts([plain], task, plain.base, target)
    assert beside.loss == alone[-1].loss
    assert bare.note == "the head of x"
