"""The target's few labelled examples and a pool → the ranking by what the experts make of the examples.

A candidate is an expert at one of the strengths of :data:`pimerge.embedding.strengths.STRENGTHS`; of each expert the
strength with the highest score stands for it. Whatever the measure, each candidate's expected gain in accuracy over
the bare base comes from the measure ``combined``, and a candidate is expected to help if that gain is above three of
its errors.
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
from pimerge.ranking.selection import MOST, GainEstimate, SelectionRule, candidate_of, document, of_first_kind

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
    """Rank experts by the target's examples.

    Args:
        experts: name → expert of the target's base.
        excluded: name → why it is none of them.
        own: the target's own expert, if it has one.
        measure: one that needs examples.
        prior: name → gain that the store predicts, see :func:`judge`.
    """
    verdict = judge(reader, experts, measure, own, prior)
    candidates = [candidate_of(name, experts[name], found) for name, found in verdict.judged.items()]
    candidates.sort(key=lambda candidate: (-candidate.score, candidate.name))
    helpful = [candidate for candidate in candidates if candidate.helps or not rule.gate]
    notes = reader.notes()
    helpful = of_first_kind(helpful, experts, notes)
    if own is None:
        notes.insert(0, "the target has no expert: its examples alone decide")
    if rule.k is None:
        scaled = [experts[candidate.name].with_strength(candidate.scale) for candidate in helpful[:MOST]]
        priors = [candidate.scale * (prior or {}).get(candidate.name, 0.0) for candidate in helpful[:MOST]]
        gains = gains_of_means(reader, scaled, priors)
        count = 1 + max(range(len(gains)), key=lambda i: gains[i]) if gains else 0
        notes += [
            f"expected gain of the mean of the first {i}: {100 * gain:+.1f} points" for i, gain in enumerate(gains, 1)
        ]
    else:
        count = rule.k
        unsure = [each.name for each in candidates if verdict.judged[each.name].is_unsure]
        if rule.gate and unsure and len(helpful) < count:
            notes.append(
                f"not selected: {', '.join(unsure)}: the best of many candidates gains something by luck, so a gain "
                "has to be above three of its errors (--no-gate selects them anyway)"
            )
    ranking = document(
        target,
        measure.name,
        count,
        candidates,
        {**excluded, **verdict.excluded},
        helpful[:count],
        f"of {len(candidates)} experts by '{measure.name}' on {len(reader.labels)} examples: " + measure.summary,
        notes,
    )
    return ranking.model_copy(update={"base_score": verdict.base_score, "seen": reader.seen()})


@dataclass(frozen=True)
class PoolEstimate:
    """Scores and gains of all candidates on the examples.

    Attributes:
        base_score: of the bare base by the measure, 0 by ``combined``; None if the measure has no score for it.
        judged: name → judgement.
        excluded: name → why the measure has no score for it.
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
    """Judge experts by the target's examples.

    Args:
        reader: the target's examples.
        experts: name → expert.
        measure: one of ``measures/`` that needs examples.
        target: the target's own expert, if it has one, for the measure ``loss``.
        prior: name → gain at full strength that the store predicts, see
            :func:`pimerge.ranking.measures.combined.store_weight`.
        seed: of the bootstrap over the examples.
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
    """The value on all examples, which stands first, and the standard deviation of those on the draws."""
    return float(values[0]), float(values[1:].std())


def gains_by_strength(reader: FeatureReader, expert: Expert, prior: float = 0.0) -> dict[float, dict[str, float]]:
    """Scale → the parts of ``combined`` above the bare base's, and the expected gain that they make together.

    Args:
        prior: what the store predicts at full strength; its part ``store`` is the gain itself.
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
    """Expected gain of the mean of the first 1, 2, … of some experts, each at its strength; without its own error.

    Args:
        priors: what the store predicts of each, at its strength.
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
    """(draws × n) how often each example is drawn, with replacement within its class, so that none goes missing.

    The classes of one example each are drawn from together: alone, such a class would always be the same, and a
    target of one example a class would look as if it had no error.

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
