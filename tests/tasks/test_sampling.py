from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pimerge.tasks.sampling import split_fold, split_holdout


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_the_same_share_of_each_class_is_held_out(share: float) -> None:
    labels = [0] * 20 + [1] * 8 + [2]
    kept, held_out = split_holdout(labels, share, seed=0)
    assert sorted(kept + held_out) == list(range(29))
    for label, size in ((0, 20), (1, 8), (2, 1)):
        count = sum(labels[index] == label for index in held_out)
        assert abs(count - share * size) <= 0.5 or count == size - 1
        assert count < size
    assert split_holdout(labels, share, seed=0) == (kept, held_out)


@given(
    labels=st.lists(st.integers(0, 3), min_size=2, max_size=30), folds=st.integers(2, 5), seed=st.integers(0, 2**31 - 1)
)
def test_folds_are_even_and_hold_every_repeated_example_out_once(labels: list[int], folds: int, seed: int) -> None:
    parts = [split_fold(labels, fold, folds, seed) for fold in range(folds)]
    for kept, held_out in parts:
        assert sorted(kept + held_out) == list(range(len(labels)))
        assert {labels[index] for index in kept} == set(labels)  # no class is without training examples
    alone = [index for index, label in enumerate(labels) if labels.count(label) == 1]
    assert sorted(index for _, held_out in parts for index in held_out) == sorted(set(range(len(labels))) - {*alone})
    for label in set(labels):
        counts = [sum(labels[index] == label for index in held_out) for _, held_out in parts]
        assert max(counts) - min(counts) <= 1
    assert split_fold(labels, 0, folds, seed) == parts[0]
