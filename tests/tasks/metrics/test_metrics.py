"""Metrics against the libraries' own corpus scores, scikit-learn and by hand."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu
from sklearn.metrics import f1_score
from torchmetrics.functional.text import squad

from pimerge.core.errors import PimergeError
from pimerge.tasks.intervals import bootstrap_interval
from pimerge.tasks.metric import METRICS, Answers

TEXTS = ["the cat sat on the mat", "a dog runs", "", "birds fly over the red tree today", "Paris"]
REFERENCES = [
    ["the cat sat on a mat", "a cat was on the mat"],
    ["the dog runs fast", "a dog runs!"],
    ["nothing"],
    ["birds fly over the tree", "red birds fly over the tall tree today"],
    ["paris"],
]
TEXT_ANSWERS = Answers([None] * 5, [0] * 5, 0, TEXTS, REFERENCES)
CHOSEN = [0, 1, 1, 2, None, 0, 2, 2]
LABELS = [0, 1, 0, 2, 2, 0, 1, 2]
CLASS_ANSWERS = Answers(CHOSEN, LABELS, 4)
NAMES = METRICS.names()


BOXES = [f"the cat<loc_{x}><loc_10><loc_{x + 40}><loc_50>" for x in (0, 10, 20, 30, 200)]
BOX_ANSWERS = Answers([None] * 5, [0] * 5, 0, BOXES, [[BOXES[0]], [BOXES[0], BOXES[4]], *([[BOXES[0]]] * 3)])
OWN_ANSWERS = {"box-accuracy": BOX_ANSWERS}


def value_of(name: str, answers: Answers = TEXT_ANSWERS) -> float:
    return bootstrap_interval(name, answers).value


def test_accuracy_and_macro_f1_are_scikit_learns() -> None:
    assert value_of("accuracy", CLASS_ANSWERS) == 5 / 8
    chosen = [-1 if choice is None else choice for choice in CHOSEN]
    expected = f1_score(LABELS, chosen, average="macro", labels=[0, 1, 2])  # class 3 does not occur
    assert value_of("macro-f1", CLASS_ANSWERS) == pytest.approx(expected)


def test_exact_match_is_letter_by_letter_but_for_white_space_around() -> None:
    assert (
        value_of("exact-match", Answers([None] * 3, [0] * 3, 0, [" a", "A", "b"], [["a"], ["a"], ["c", "b "]])) == 2 / 3
    )


def test_token_f1_is_squads() -> None:
    predictions = [{"prediction_text": text, "id": str(i)} for i, text in enumerate(TEXTS)]
    targets = [
        {"answers": {"answer_start": [0] * len(texts), "text": texts}, "id": str(i)}
        for i, texts in enumerate(REFERENCES)
    ]
    assert value_of("token-f1") == pytest.approx(float(squad(predictions, targets)["f1"]) / 100)
    assert value_of("token-f1", Answers([None], [0], 0, ["a red cat"], [["the red cat sat"]])) == pytest.approx(4 / 5)


def test_rouge_l_takes_the_best_reference() -> None:
    scorer = RougeScorer(["rougeL"])
    best = [scorer.score_multi(texts, text)["rougeL"].fmeasure for text, texts in zip(TEXTS, REFERENCES, strict=True)]
    assert value_of("rouge-l") == pytest.approx(sum(best) / 5)


def test_bleu_is_that_of_the_corpus_and_not_the_mean_of_sentences() -> None:
    for width in (1, 2):
        references = [(texts * 2)[:width] for texts in REFERENCES]
        expected = corpus_bleu(TEXTS, [list(column) for column in zip(*references, strict=True)]).score
        assert expected > 5
        assert value_of("bleu", Answers([None] * 5, [0] * 5, 0, TEXTS, references)) == pytest.approx(expected)


def test_cider_is_ten_for_the_references_themselves() -> None:
    texts = ["a red cat on the mat", "two dogs run in the park", "birds fly over trees today"]
    same = Answers([None] * 3, [0] * 3, 0, [text.upper() + "!" for text in texts], [[text] for text in texts])
    assert value_of("cider", same) == pytest.approx(10)
    swapped = Answers([None] * 3, [0] * 3, 0, texts[1:] + texts[:1], [[text] for text in texts])
    assert value_of("cider", swapped) < 1


def test_a_box_is_right_that_overlaps_by_more_than_half() -> None:
    # shifted by 0, 10, 20 and 30 of 40: 1, 0.6, 1/3 and 1/7
    assert value_of("box-accuracy", BOX_ANSWERS) == 2 / 5
    turned = Answers([None] * 3, [0] * 3, 0, ["40 50 0 10", "no box", "1 2 3"], [["a 0 10 40 50"]] * 3)
    assert value_of("box-accuracy", turned) == 1 / 3
    with pytest.raises(PimergeError, match="the right answer 'b' holds no box"):
        bootstrap_interval("box-accuracy", Answers([None], [0], 0, ["1 2 3 4"], [["b"]]))


@pytest.mark.parametrize("name", NAMES)
def test_the_interval_is_of_resampled_examples_and_seeded(name: str) -> None:
    usual = CLASS_ANSWERS if "classes" in METRICS.load(name).needs else TEXT_ANSWERS
    answers = OWN_ANSWERS.get(name, usual)
    found = bootstrap_interval(name, answers)
    assert found == bootstrap_interval(name, answers)
    assert found.low <= found.value <= found.high
    assert found.low < found.high or name == "exact-match"


def test_the_interval_of_a_mean_is_about_that_of_the_normal_distribution() -> None:
    hits = (torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.3).tolist()
    answers = Answers([None] * 400, [0] * 400, 0, ["yes" if hit else "no" for hit in hits], [["yes"]] * 400)
    found = bootstrap_interval("exact-match", answers)
    share = sum(hits) / 400
    half = 1.96 * (share * (1 - share) / 400) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx((share, share - half, share + half), abs=0.006)


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("macro-f1", "torchmetrics"),
        ("token-f1", "torchmetrics"),
        ("rouge-l", "rouge_score"),
        ("bleu", "sacrebleu"),
        ("cider", "pycocoevalcap"),
    ],
)
def test_a_library_that_is_not_there_is_named_with_the_command(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    nothing: Any = None
    monkeypatch.setitem(sys.modules, library, nothing)
    with pytest.raises(PimergeError, match=rf"(?s)'{library}'.*pip install 'pimerge\[metrics\]'"):
        bootstrap_interval(name, CLASS_ANSWERS if name == "macro-f1" else TEXT_ANSWERS)
