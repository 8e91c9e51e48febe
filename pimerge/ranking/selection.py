"""Select experts of a ranking: what is asked for, which are expected to help, how many; and the document."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pimerge.adapters.expert import Expert
from pimerge.adapters.ranking_document import Candidate, NotComparable, Ranking, Target
from pimerge.core.files import relative_to

MOST = 8
Z95 = 1.959963984540054
# An expert is expected to help if its gain is above this many standard errors. By examples, the best of some dozens of
# candidates (experts at several strengths) is the best partly by luck, so such a choice needs three.
LEAST_ERRORS = 3.0
LEAST_ERRORS_OF_HISTORY = 1.0
# Features are computed in float32: a gain below this is rounding.
LEAST_GAIN = 1e-6


@dataclass(frozen=True)
class SelectionRule:
    """What is asked for.

    Attributes:
        k: how many experts to select; None to choose the number.
        gate: whether only experts are selected that are expected to help.
    """

    k: int | None = 2
    gate: bool = True


@dataclass(frozen=True)
class GainEstimate:
    """One expert as the target's examples judge it.

    Attributes:
        strength: its best one.
        score, error: by the measure, at that strength, and its standard error over draws of the examples; of
            ``combined`` they are those of the gain.
        gain, gain_error: expected gain in accuracy over the bare base (0.01 is a point), and its standard error.
        tested: whether the gain rests on examples that were held out; if not, no expert is expected to help.
        least_errors: how many of its errors the gain has to be above zero.
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
        """Whether the gain is above the threshold."""
        return self.tested and self.gain > max(self.least_errors * self.gain_error, LEAST_GAIN)

    @property
    def is_unsure(self) -> bool:
        """Whether the gain is below the threshold though its interval is above zero."""
        return self.tested and not self.helps and self.gain - Z95 * self.gain_error > LEAST_GAIN


def candidate_of(name: str, expert: Expert, found: GainEstimate) -> Candidate:
    """A candidate as the ranking names it."""
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


def of_first_kind(candidates: Sequence[Candidate], experts: Mapping[str, Expert], notes: list[str]) -> list[Candidate]:
    """The candidates that can be combined with the first, so that all selected ones can be merged or tuned together.

    All that have a ΔW can, whatever their kinds; the others with those of their kind.

    Args:
        notes: told who is left out.
    """
    every = [experts[candidate.name] for candidate in candidates]
    summed = ["" if expert.modules else expert.kind for expert in every]
    found = [candidate for candidate, kind in zip(candidates, summed, strict=True) if kind == summed[0]]
    left = [expert.name for expert, kind in zip(every, summed, strict=True) if kind != summed[0]]
    if left:
        notes.append(
            f"not selected, since {every[0].name} is of kind {every[0].kind} and they cannot be summed with it: "
            f"{', '.join(left)}"
        )
    return found


def widest_gap(scores: Sequence[float], most: int = MOST) -> int:
    """How many stand before the widest gap in descending scores, among the first ``most``.

    >>> widest_gap([0.9, 0.8, 0.3, 0.2]), widest_gap([0.5]), widest_gap([])
    (2, 1, 0)
    """
    gaps = [first - second for first, second in itertools.pairwise(scores[: most + 1])]
    return 1 + max(range(len(gaps)), key=lambda i: gaps[i]) if gaps else len(scores)


def document(
    target: Target,
    measure: str,
    k: int,
    candidates: list[Candidate],
    excluded: Mapping[str, str],
    selected: Sequence[Candidate],
    what: str,
    notes: list[str],
) -> Ranking:
    """The document, with the sentence on why these experts are selected."""
    if selected:
        why = f"the {len(selected)} best {what}"
    elif candidates:
        why = f"no expert is expected to help, {what}"
    else:
        why = f"no expert of the store can be compared with {target.name}"
    return Ranking(
        target=target,
        measure=measure,
        k=k,
        selected=[candidate.name for candidate in selected],
        why=why,
        notes=notes,
        candidates=candidates,
        not_comparable=[NotComparable(name=name, reason=reason) for name, reason in excluded.items()],
    )
