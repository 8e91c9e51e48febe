"""How many are selected."""

from __future__ import annotations

from pimerge.ranking.selection import widest_gap


def test_the_widest_gap_is_before_the_first_that_is_far() -> None:
    assert widest_gap([0.9, 0.8, 0.75, 0.1, 0.0]) == 3
    assert widest_gap([0.9, 0.1, 0.09]) == 1
    assert widest_gap([0.9, 0.7, 0.6, 0.0]) == 3
    assert widest_gap([0.9, 0.7, 0.6, 0.0], most=2) == 1  # how far the fourth is, is not looked at
    assert widest_gap([0.4]) == 1
    assert widest_gap([]) == 0
