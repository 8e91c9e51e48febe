"""Rank a pool by the features of the target's labelled examples under each expert.

Each expert is tried at the strengths of :data:`pimerge.embedding.strengths.STRENGTHS` and represented by the strength
with the highest score. With every measure, the expected gain in accuracy over the bare base comes from the measure
``combined``. An expert is expected to help if its gain exceeds three standard errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pimerge.adapters.expert import Expert
from pimerge.adapters.ranking_document import Ranking, Target
from pimerge.core.errors import PimergeError
from pimerge.embedding.features import FeatureReader
from pimerge.ranking.measure import Measure
from pimerge.ranking.measures import combined
from pimerge.ranking.selection import MOST, GainEstimate, SelectionRule, best_first, candidate_of, ranking_of

if TYPE_CHECKING:
    from torch import Tensor

DRAWS = 50


def rank_by_examples(
    reader: FeatureReader,
    experts: Mapping[str, Expert],
    excluded: Mapping[str, str],
    target: Target,
    own: Expert | None,
    measure: Measure,
    rule: SelectionRule,
    prior: Mapping[str, float] | None = None,
) -> Ranking:
    """Rank experts by a measure of the target's examples.

    Args:
        reader: reads the features of the target's examples.
        experts: name → expert on the target's base.
        excluded: name → why the expert is not among them.
        own: the target's own expert, if it has one.
        measure: a measure of examples.
        prior: name → gain that the store predicts, see :func:`judge`.
    """
    verdict = judge(reader, experts, measure, own, prior)
    candidates = best_first([candidate_of(name, experts[name], found) for name, found in verdict.judged.items()])
    notes = reader.notes()
    eligible = rule.eligible(candidates, experts, notes)
    if own is None:
        notes.insert(0, "the target has no expert, so its examples alone decide")
    count = rule.k
    if count is None:
        scaled = [experts[candidate.name].with_strength(candidate.scale) for candidate in eligible[:MOST]]
        priors = [candidate.scale * (prior or {}).get(candidate.name, 0.0) for candidate in eligible[:MOST]]
        gains = gains_of_means(reader, scaled, priors)
        count = 1 + max(range(len(gains)), key=lambda i: gains[i]) if gains else 0
        notes += [
            f"expected gain of the mean of the first {i}: {100 * gain:+.1f} points" for i, gain in enumerate(gains, 1)
        ]
    elif rule.gate and len(eligible) < count:
        unsure = [each.name for each in candidates if verdict.judged[each.name].is_unsure]
        if unsure:
            notes.append(
                f"not selected: {', '.join(unsure)}: the best of many candidates gains something by chance, so a gain "
                "has to exceed three of its standard errors (--no-gate selects them all the same)"
            )
    what = f"experts by '{measure.name}' on {len(reader.labels)} examples"
    excluded = {**excluded, **verdict.excluded}
    ranking = ranking_of(target, measure, candidates, excluded, eligible, count, what, notes)
    return ranking.model_copy(update={"base_score": verdict.base_score, "seen": reader.seen()})


@dataclass(frozen=True)
class PoolEstimate:
    """Estimates for a pool of experts by the target's examples.

    Attributes:
        base_score: score of the bare base, 0 for ``combined``; None if the measure has no score for it.
        judged: name → score and expected gain.
        excluded: name → why the measure has no score for the expert.
    """

    base_score: float | None
    judged: dict[str, GainEstimate]
    excluded: dict[str, str]


def judge(
    reader: FeatureReader,
    experts: Mapping[str, Expert],
    measure: Measure,
    target: Expert | None,
    prior: Mapping[str, float] | None = None,
    *,
    seed: int = 0,
) -> PoolEstimate:
    """Estimate the scores and gains of experts by the target's examples.

    Args:
        reader: reads the features of the target's examples.
        experts: name → expert.
        measure: a measure of examples.
        target: the target's own expert, if it has one, for the measure ``loss``.
        prior: name → gain at full strength that the store predicts, see
            :func:`pimerge.ranking.measures.combined.store_weight`.
        seed: seed of the bootstrap over the examples.
    """
    base = reader.base_features()
    one = torch.ones(1, len(base.labels), dtype=torch.float64)
    weights = torch.cat([one, bootstrap(base.labels, DRAWS, seed)])
    base_gains = combined.scores(base, weights)
    base_score = None
    if measure.is_gain:
        base_score = 0.0
    elif not measure.reads_answers:
        base_score = float(measure.scores(base, one))
    judged: dict[str, GainEstimate] = {}
    excluded: dict[str, str] = {}
    for name, expert in experts.items():
        try:
            samples = reader.features(expert)
            if measure.reads_answers:
                samples = reader.with_losses(expert, samples, target)
            predicted = {strength: strength * (prior or {}).get(name, 0.0) for strength in samples}
            found = {
                strength: float(measure.scores(sample, one)) + (predicted[strength] if measure.is_gain else 0.0)
                for strength, sample in samples.items()
            }
        except PimergeError as error:
            error.raise_if_disk_fails()
            excluded[name] = error.problems[0].message
            continue
        strength = max(found, key=lambda strength: (found[strength], -strength))
        gains = combined.scores(samples[strength], weights) - base_gains + predicted[strength]
        scores = gains if measure.is_gain else measure.scores(samples[strength], weights)
        judged[name] = GainEstimate(
            strength, *_with_error(scores), *_with_error(gains), tested=combined.part_of(base).measure.held_out
        )
    return PoolEstimate(base_score, judged, excluded)


def _with_error(values: Tensor) -> tuple[float, float]:
    """Return the first value, which is for all examples, and the standard deviation over the bootstrap samples."""
    return float(values[0]), float(values[1:].std())


def gains_by_strength(reader: FeatureReader, expert: Expert, prior: float = 0.0) -> dict[float, dict[str, float]]:
    """Return strength → each part of ``combined`` minus its value for the bare base, and the resulting expected gain.

    Args:
        prior: gain at full strength that the store predicts.
    """
    base = reader.base_features()
    one = torch.ones(1, len(base.labels), dtype=torch.float64)
    part, found = combined.part_of(base), {}
    for strength, sample in reader.features(expert).items():
        above = float(part.measure.scores(sample, one) - part.measure.scores(base, one))
        store = {"store": strength * prior} if prior else {}
        found[strength] = {part.measure.name: above, **store, "expected gain": part.weight * above + strength * prior}
    return found


def gains_of_means(reader: FeatureReader, experts: Sequence[Expert], priors: Sequence[float]) -> list[float]:
    """Return the expected gains of the mean of the first 1, 2, … of some experts, each at its strength.

    Args:
        priors: gain of each expert at its strength that the store predicts.
    """
    base = reader.base_features()
    one = torch.ones(1, len(base.labels), dtype=torch.float64)
    base_gain = combined.scores(base, one)
    found = []
    for count in range(1, 1 + len(experts)):
        mean = reader.mean_features(experts[:count])
        found.append(float(combined.scores(mean, one) - base_gain) + sum(priors[:count]) / count)
    return found


def bootstrap(labels: Tensor, draws: int, seed: int) -> Tensor:
    """Return how often each example is in each bootstrap sample, (draws × n).

    Examples are drawn with replacement within their class, so that every class is in every sample. Classes with a
    single example form one class for this purpose; otherwise a target with one example per class would have no error.

    >>> bootstrap(torch.tensor([0, 0, 1]), 2, seed=0)[:, 2].tolist()
    [1.0, 1.0]
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(draws, len(labels), dtype=torch.float64)
    strata = torch.where(labels.bincount()[labels] > 1, labels, -1)
    for stratum in sorted(set(strata.tolist())):
        members = (strata == stratum).nonzero()[:, 0]
        drawn = members[torch.randint(len(members), (draws, len(members)), generator=generator)]
        weights.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    return weights
