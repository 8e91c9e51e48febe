"""Selection of ranked experts: the threshold, the number to select, and the ranking that states the result."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pimerge.adapters.expert import Expert
from pimerge.adapters.ranking_document import Candidate, NotComparable, Ranking, Target
from pimerge.core.files import relative_to
from pimerge.ranking.measure import Measure

MOST = 8
Z95 = 1.959963984540054
# The threshold in standard errors of the expected gain. The best of dozens of candidates (experts at several strengths)
# is partly there by luck; three errors account for having chosen the best.
LEAST_ERRORS = 3.0
LEAST_ERRORS_OF_HISTORY = 1.0
# Features are computed in float32; a smaller gain is rounding.
LEAST_GAIN = 1e-6


@dataclass(frozen=True)
class SelectionRule:
    """How experts are selected.

    Attributes:
        k: number of experts to select; None chooses the number.
        gate: whether only experts that are expected to help are selected.
    """

    k: int | None = 2
    gate: bool = True

    def eligible(
        self, candidates: Sequence[Candidate], experts: Mapping[str, Expert], notes: list[str]
    ) -> list[Candidate]:
        """Return the candidates that may be selected together, in their order.

        They pass the threshold and can be summed with the first of them, so that the selected experts can be merged or
        tuned: experts with ΔW of any kind, or experts of one kind without ΔW.

        Args:
            notes: receives a sentence about the experts that are left out.
        """
        passing = [candidate for candidate in candidates if candidate.helps or not self.gate]
        every = [experts[candidate.name] for candidate in passing]
        kinds = ["" if expert.modules else expert.kind for expert in every]
        if left := [expert.name for expert, kind in zip(every, kinds, strict=True) if kind != kinds[0]]:
            notes.append(
                f"not selected, since they cannot be summed with {every[0].name}, which is of kind {every[0].kind}: "
                f"{', '.join(left)}"
            )
        return [candidate for candidate, kind in zip(passing, kinds, strict=True) if kind == kinds[0]]

    def count(self, candidates: Sequence[Candidate]) -> int:
        """Return the number to select of eligible candidates: ``k``, or those before the widest gap in scores."""
        return self.k if self.k is not None else widest_gap([candidate.score for candidate in candidates])


@dataclass(frozen=True)
class GainEstimate:
    """Score and expected gain of one expert.

    Attributes:
        strength: its best strength.
        score, error: score by the measure at that strength, and its standard error over bootstrap samples of the
            examples. For ``combined`` they equal the gain and its error.
        gain, gain_error: expected gain in accuracy over the bare base (0.01 is a point), and its standard error.
        tested: whether the gain comes from held-out examples; otherwise the expert is never expected to help.
        least_errors: the threshold, in standard errors of the gain.
    """

    strength: float
    score: float
    error: float
    gain: float
    gain_error: float
    tested: bool = True
    least_errors: float = LEAST_ERRORS

    @property
    def helps(self) -> bool:
        """Whether the gain exceeds the threshold."""
        return self.tested and self.gain > max(self.least_errors * self.gain_error, LEAST_GAIN)

    @property
    def is_unsure(self) -> bool:
        """Whether the gain is below the threshold although its 95 % interval lies above zero."""
        return self.tested and not self.helps and self.gain - Z95 * self.gain_error > LEAST_GAIN


def candidate_of(name: str, expert: Expert, found: GainEstimate) -> Candidate:
    """Return the candidate of an expert by its expected gain."""
    return Candidate(
        name=name,
        path=relative_to(expert.path, Path()),
        sha256=expert.sha256,
        score=found.score,
        low=found.score - Z95 * found.error,
        high=found.score + Z95 * found.error,
        scale=found.strength,
        gain=found.gain,
        gain_low=found.gain - Z95 * found.gain_error,
        gain_high=found.gain + Z95 * found.gain_error,
        helps=found.helps,
    )


def candidate_by_cosine(
    name: str, path: Path, sha256: str, score: float, error: float, threshold: float = -math.inf
) -> Candidate:
    """Return the candidate with a cosine as its score; its 95 % interval is cut at −1 and 1."""
    low, high = max(-1.0, score - Z95 * error), min(1.0, score + Z95 * error)
    where = relative_to(path, Path())
    return Candidate(name=name, path=where, sha256=sha256, score=score, low=low, high=high, helps=score > threshold)


def best_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Sort candidates by descending score; equal scores are in alphabetical order."""
    return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.name))


def widest_gap(scores: Sequence[float], most: int = MOST) -> int:
    """Return how many descending scores stand before the widest gap between the first ``most``.

    >>> widest_gap([0.9, 0.8, 0.3, 0.2]), widest_gap([0.5]), widest_gap([])
    (2, 1, 0)
    """
    gaps = [first - second for first, second in itertools.pairwise(scores[: most + 1])]
    return 1 + max(range(len(gaps)), key=lambda i: gaps[i]) if gaps else len(scores)


def ranking_of(
    target: Target,
    measure: Measure,
    candidates: list[Candidate],
    excluded: Mapping[str, str],
    eligible: Sequence[Candidate],
    k: int,
    what: str,
    notes: list[str],
) -> Ranking:
    """Return the ranking that selects the first k eligible candidates, and says why.

    Args:
        candidates: best first.
        excluded: name → why the expert is not a candidate.
        what: what the candidates are and how they were compared, in words.
    """
    selected = [candidate.name for candidate in eligible[:k]]
    compared = f"of {len(candidates)} {what}: {measure.summary}"
    if not candidates:
        why = f"no expert of the store can be compared with {target.name}"
    else:
        why = f"the {len(selected)} best {compared}" if selected else f"no expert is expected to help, {compared}"
    return Ranking(
        target=target,
        measure=measure.name,
        k=k,
        selected=selected,
        why=why,
        notes=notes,
        candidates=candidates,
        not_comparable=[NotComparable(name=name, reason=reason) for name, reason in excluded.items()],
    )
