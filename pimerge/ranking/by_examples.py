"""A target's examples and a pool → the ranking by what the experts make of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pimerge.adapters.expert import Expert
from pimerge.adapters.ranking_document import Ranking, Target
from pimerge.core import plugins
from pimerge.embedding.features import FeatureReader
from pimerge.ranking.few_shot import gains_of_means, judge
from pimerge.ranking.selection import MOST, SelectionRule, candidate_of, document, of_first_kind


def rank_by_examples(
    reader: FeatureReader,
    experts: Mapping[str, Expert],
    excluded: Mapping[str, str],
    target: Target,
    own: Expert | None,
    measure: str,
    rule: SelectionRule,
    folder: Path,
    prior: Mapping[str, float] | None = None,
) -> Ranking:
    """Rank experts by what they make of the target's examples.

    Args:
        experts: name → expert of the target's base.
        excluded: name → why it is none of them.
        own: the target's own expert, if it has one.
        measure: one that needs examples.
        prior: name → gain that the store foretells, see :func:`pimerge.ranking.few_shot.judge`.

    Raises:
        PimergeError: if the measure cannot be had from these examples.
    """
    strategy = plugins.load("pimerge.ranking.measures", measure)
    verdict = judge(reader, experts, strategy, own, prior)
    candidates = [candidate_of(name, experts[name], found, folder) for name, found in verdict.judged.items()]
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
                f"not selected: {', '.join(unsure)}: the best of so many candidates gains something by luck, so a gain "
                "has to be above three of its errors (--no-gate selects all the same)"
            )
    return document(
        target,
        measure,
        count,
        candidates,
        {**excluded, **verdict.excluded},
        helpful[:count],
        f"of {len(candidates)} experts by '{measure}' on {len(reader.labels)} examples: "
        + plugins.summaries("pimerge.ranking.measures")[measure],
        notes,
        verdict.base_score,
        reader.seen(),
    )
