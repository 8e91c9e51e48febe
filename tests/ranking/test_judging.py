"""How examples judge candidates, against loops over resampled examples and formulas written out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pimerge.adapters.expert import open_expert
from pimerge.checkpoints.base import find_base
from pimerge.core.errors import PimergeError
from pimerge.embedding.features import FeatureReader, Sampling, TargetFeatures
from pimerge.embedding.strengths import STRENGTHS
from pimerge.models.linear_probe import held_out_probability
from pimerge.models.loading import load_base
from pimerge.ranking.by_examples import DRAWS, bootstrap, gains_by_strength, gains_of_means, judge
from pimerge.ranking.measures import combined, h_score, label_cka, leep, likelihood, logme, probe
from pimerge.ranking.selection import GainEstimate
from pimerge.tasks.task import open_task
from tests.support.experts import MakeExpert
from tests.support.references import dense_model, features
from tests.support.samples import BASE, LABELS, plain, sample_of

ONE = torch.float64


class Seen:
    """A reader that has seen everything: candidate → scale → sample."""

    def __init__(
        self, base: TargetFeatures, candidates: Mapping[str, Mapping[float, TargetFeatures] | PimergeError]
    ) -> None:
        self.base, self.candidates = base, candidates

    def base_features(self) -> TargetFeatures:
        return self.base

    def features(self, expert: str) -> Mapping[float, TargetFeatures]:
        found = self.candidates[expert]
        if isinstance(found, PimergeError):
            raise found
        return found

    def with_losses(
        self, expert: str, samples: Mapping[float, TargetFeatures], target: None
    ) -> Mapping[float, TargetFeatures]:
        return samples


def judged_by(measure: Any, base: TargetFeatures, **candidates: Mapping[float, TargetFeatures] | PimergeError) -> Any:
    reader: Any = Seen(base, candidates)
    experts: Any = {name: name for name in candidates}
    return judge(reader, experts, measure.MEASURE, None)


def repeated(sample: TargetFeatures, draw: Tensor) -> TargetFeatures:
    rows = torch.arange(len(sample.labels)).repeat_interleave(draw.long())
    return TargetFeatures(sample.vectors[rows], sample.labels[rows], sample.classes)


def gains_by_hand(sample: TargetFeatures, base: TargetFeatures, draws: Tensor) -> list[float]:
    """The formula of ``combined``: what the probes foretell of the drawn examples."""
    first, second = (held_out_probability(s.vectors, s.labels, s.classes) for s in (sample, base))
    return [0.6 * float(draw / draw.sum() @ (first - second)) for draw in draws.double()]


GOOD = {0.25: sample_of(0.5), 0.5: sample_of(1.5), 0.75: sample_of(0.9), 1.0: sample_of(0.1)}


@pytest.mark.parametrize("measure", [label_cka, logme, h_score])
def test_the_best_scale_stands_for_an_expert_with_its_error_over_resampled_examples(measure: Any) -> None:
    verdict = judged_by(measure, BASE, good=GOOD)
    found = verdict.judged["good"]
    assert found.strength == max(GOOD, key=lambda scale: plain(measure, GOOD[scale])) == 0.5
    assert found.score == pytest.approx(plain(measure, GOOD[0.5]), abs=1e-9)
    assert verdict.base_score == pytest.approx(plain(measure, BASE), abs=1e-9)
    draws = bootstrap(LABELS, DRAWS, seed=0)
    scores = torch.tensor([plain(measure, repeated(GOOD[0.5], draw)) for draw in draws])
    assert found.error == pytest.approx(float(scores.std()), abs=1e-5)
    assert found.error > 0
    gain, *gains = gains_by_hand(GOOD[0.5], BASE, torch.cat([torch.ones(1, 30), draws]))
    assert found.gain == pytest.approx(gain, abs=1e-9)
    assert found.gain_error == pytest.approx(float(torch.tensor(gains).std()), abs=1e-6)


def test_the_score_of_combined_is_the_expected_gain() -> None:
    verdict = judged_by(combined, BASE, good=GOOD)
    found = verdict.judged["good"]
    assert verdict.base_score == 0
    assert found.gain == pytest.approx(gains_by_hand(GOOD[0.5], BASE, torch.ones(1, 30))[0], abs=1e-9)
    assert (found.score, found.error) == (found.gain, found.gain_error)


def test_what_the_store_foretells_is_added_in_proportion_to_the_scale() -> None:
    reader: Any = Seen(BASE, {"good": GOOD, "other": GOOD})
    experts: Any = {"good": "good", "other": "other"}
    plainly = judge(reader, experts, combined.MEASURE, None).judged["other"]
    verdict = judge(reader, experts, combined.MEASURE, None, {"good": 3.0})
    assert verdict.judged["other"] == plainly
    found = verdict.judged["good"]
    assert found.strength == 1.0  # 3 · (1 − 0.5) is more than what the examples see in the scale 0.5
    by_examples = gains_by_hand(GOOD[1.0], BASE, torch.ones(1, 30))[0]
    assert found.gain == found.score == pytest.approx(3 + by_examples, abs=1e-9)
    by_logme = judge(reader, experts, logme.MEASURE, None, {"good": 3.0}).judged["good"]
    assert by_logme.strength == max(GOOD, key=lambda scale: plain(logme, GOOD[scale])) == 0.5
    assert by_logme.gain == pytest.approx(1.5 + plainly.gain, abs=1e-9)


def test_equal_scores_go_to_the_smallest_scale() -> None:
    assert judged_by(combined, BASE, same=dict.fromkeys(STRENGTHS, GOOD[0.5])).judged["same"].strength == 0.25


def test_the_gate_opens_for_a_gain_above_three_of_its_errors() -> None:
    for gain, error, helps in ((0.04, 0.01, True), (0.02, 0.01, False), (-0.04, 0.01, False), (0.0, 0.0, False)):
        assert GainEstimate(1.0, 0.0, 0.0, gain, error).helps is helps
    shuffled = sample_of(1.5).vectors[torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    verdict = judged_by(
        logme,
        BASE,
        good=GOOD,
        same=dict.fromkeys(STRENGTHS, BASE),
        noise=dict.fromkeys(STRENGTHS, TargetFeatures(shuffled, LABELS, 3)),
        constant=dict.fromkeys(STRENGTHS, TargetFeatures(torch.ones(30, 6, dtype=ONE), LABELS, 3)),
    )
    assert {name: found.helps for name, found in verdict.judged.items()} == {
        "good": True,
        "same": False,
        "noise": False,
        "constant": False,
    }
    assert (verdict.judged["same"].gain, verdict.judged["same"].gain_error) == (0, 0)


def test_a_candidate_without_a_score_is_left_out_with_the_reason() -> None:
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    heads = {scale: TargetFeatures(s.vectors, s.labels, s.classes, logits) for scale, s in GOOD.items()}
    broken = PimergeError("the features hold NaN or Inf")
    verdict = judged_by(leep, BASE, headless=GOOD, broken=broken, heads=heads)
    assert list(verdict.judged) == ["heads"]
    assert "gives no class probabilities" in verdict.excluded["headless"]
    assert verdict.excluded["broken"] == "the features hold NaN or Inf"
    assert verdict.base_score is None


def numbers(found: GainEstimate) -> tuple[float, ...]:
    return found.score, found.error, found.gain, found.gain_error


@pytest.mark.parametrize("measure", [combined, logme, label_cka, h_score])
@pytest.mark.parametrize("labels", [torch.arange(2), torch.arange(3), torch.arange(9), torch.tensor([0, 1, 1, 3])])
def test_one_example_a_class_in_many_dimensions_has_a_finite_error_above_zero(labels: Tensor, measure: Any) -> None:
    candidates = {scale: sample_of(2 * scale, labels, seed=3, d=50) for scale in STRENGTHS}
    found = judged_by(measure, sample_of(0.1, labels, d=50), few=candidates).judged["few"]
    assert all(map(math.isfinite, numbers(found)))
    if len(labels) > 2:
        assert found.gain_error > 0
    else:  # any two examples are aligned with two classes
        assert not found.helps


def test_without_two_of_a_class_combined_is_label_cka_alone_and_a_probe_an_error() -> None:
    labels = torch.arange(4)
    base, candidate = sample_of(0.1, labels), sample_of(2.0, labels, seed=1)
    found = judged_by(combined, base, few=dict.fromkeys(STRENGTHS, candidate)).judged["few"]
    expected = combined.CKA_WEIGHT * (plain(label_cka, candidate) - plain(label_cka, base))
    assert found.gain == pytest.approx(expected, abs=1e-12)
    with pytest.raises(PimergeError, match="every class has one example"):
        judged_by(probe, base, few=dict.fromkeys(STRENGTHS, candidate))


def test_the_bootstrap_draws_within_each_class_and_the_single_examples_from_each_other() -> None:
    labels = torch.tensor([0, 1, 0, 2, 0, 1, 3, 4])
    draws = bootstrap(labels, 2000, seed=0)
    assert draws.dtype == torch.float64
    assert (draws[:, labels == 0].sum(1) == 3).all()
    assert (draws[:, labels == 1].sum(1) == 2).all()
    assert (draws[:, labels >= 2].sum(1) == 3).all()
    assert draws.mean(0).tolist() == pytest.approx([1.0] * 8, abs=0.07)
    variance = torch.tensor([3 * 2 / 9, 2 / 4, 3 * 2 / 9, 3 * 2 / 9]).tolist()  # n · 1/n · (1 − 1/n)
    assert draws[:, :4].var(0).tolist() == pytest.approx(variance, abs=0.07)
    assert torch.equal(bootstrap(labels, 2000, seed=0), draws)
    assert not torch.equal(bootstrap(labels, 2000, seed=1), draws)


def test_the_parts_of_a_gain_are_shown_by_scale() -> None:
    reader: Any = Seen(BASE, {"good": GOOD})
    expert: Any = "good"
    found = gains_by_strength(reader, expert)
    assert list(found) == list(STRENGTHS)
    for scale, parts in found.items():
        assert parts["likelihood"] == pytest.approx(plain(likelihood, GOOD[scale]) - plain(likelihood, BASE), abs=1e-12)
        assert parts["expected gain"] == pytest.approx(0.6 * parts["likelihood"], abs=1e-12)


def test_what_the_store_foretells_is_shown_in_proportion_to_the_scale() -> None:
    reader: Any = Seen(BASE, {"good": GOOD})
    expert: Any = "good"
    for scale, parts in gains_by_strength(reader, expert, prior=0.04).items():
        by_examples = gains_by_hand(GOOD[scale], BASE, torch.ones(1, 30))[0]
        assert parts["store"] == pytest.approx(scale * 0.04, abs=1e-12)
        assert parts["expected gain"] == pytest.approx(by_examples + scale * 0.04, abs=1e-9)


def test_gains_of_means_are_those_of_the_dense_means(
    bert_base: Path, text_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    task, base = open_task(text_task), find_base(str(bert_base), None, bert_base)
    loaded = load_base(base, task, torch.device("cpu"), torch.float32)
    reader = FeatureReader(loaded, base, task, Sampling(limit=12))
    experts = [
        open_expert(make_expert(tmp_path / str(seed), bert_base, text_task, seed=seed, r=rank, lora_alpha=200))
        for seed, rank in ((0, 4), (1, 2), (2, 4))
    ]
    experts[1] = experts[1].with_strength(0.25)
    labels = torch.tensor([int(reader.examples[index]["labels"]) for index in range(12)])

    def sample(count: int) -> TargetFeatures:
        dense = dense_model(bert_base, experts[:count], [1 / count] * count)
        return TargetFeatures(features(dense, "bert", reader).double(), labels, 2)

    base_features = TargetFeatures(features(dense_model(bert_base, [], []), "bert", reader).double(), labels, 2)
    expected = [gains_by_hand(sample(count), base_features, torch.ones(1, 12))[0] for count in (1, 2, 3)]
    assert len(set(expected)) == 3
    assert gains_of_means(reader, experts, [0.0] * 3) == pytest.approx(expected, abs=1e-5)
    with_store = [gain + store for gain, store in zip(expected, (0.3, 0.35, 0.1), strict=True)]
    assert gains_of_means(reader, experts, [0.3, 0.4, -0.4]) == pytest.approx(with_store, abs=1e-5)
    assert max(map(abs, expected)) > 1e-3
    assert gains_of_means(reader, [], []) == []
