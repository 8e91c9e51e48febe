"""Share of the answers whose box overlaps a reference's by more than half: Acc@0.5 of RefCOCO (arXiv 1608.00272).

A text's box is its last four whole numbers, x and y of one corner and of the other, as in Florence-2's
``<loc_12><loc_30><loc_400><loc_520>``; an answer without four numbers is wrong.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeAlias

from pimerge.core.errors import PimergeError
from pimerge.tasks.metric import Answers, Metric
from pimerge.tasks.metrics._mean import best, value

if TYPE_CHECKING:
    from torch import Tensor


Box: TypeAlias = tuple[int, int, int, int]


def statistics(answers: Answers) -> Tensor:
    """1 for an answer whose box has an intersection over union above 0.5 with a reference's, else 0."""
    return best(answers, _hits)


def _hits(text: str, reference: str) -> float:
    right = box_of(reference)
    if right is None:
        raise PimergeError(
            f"box-accuracy: the right answer '{reference}' holds no box",
            "let the answers end in four whole numbers, or use another metric",
        )
    found = box_of(text)
    return float(found is not None and intersection_over_union(found, right) > 0.5)


def box_of(text: str) -> Box | None:
    """The last four whole numbers of a text, the lower corner first; None if it has fewer.

    >>> box_of("the left cat<loc_7><loc_20><loc_5><loc_40>"), box_of("no box")
    ((5, 20, 7, 40), None)
    """
    numbers = [int(number) for number in re.findall(r"\d+", text)[-4:]]
    if len(numbers) < 4:
        return None
    (x, right), (y, bottom) = sorted(numbers[::2]), sorted(numbers[1::2])
    return x, y, right, bottom


def intersection_over_union(first: Box, second: Box) -> float:
    """Intersection over union of two boxes; 0 for two without an area.

    >>> intersection_over_union((0, 0, 2, 2), (1, 0, 3, 2)) == 1 / 3
    True
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    whole = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - shared
    return shared / whole if whole else 0.0


METRIC = Metric(
    name="box-accuracy",
    summary="Share of the answers whose box overlaps a reference's by more than half: Acc@0.5 of RefCOCO.",
    needs=("texts",),
    format=".1%",
    statistics=statistics,
    value=value,
)
