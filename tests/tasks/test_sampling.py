from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pimerge.core.errors import PimergeError
from pimerge.tasks.sampling import sample_sentences, sample_shots, split_fold, split_holdout, stratified_folds


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


LABELS = [0, 0, 0, 3, 1, 1, 1, 0, 0, 0, 1, 2, 0, 3]


def test_a_seed_always_gives_the_same_splits() -> None:
    assert split_holdout(LABELS, 0.5, seed=637381822)[1] == [0, 1, 6, 8, 9, 10, 13]
    held_out = [split_fold(LABELS, fold, 6, seed=637381822)[1] for fold in range(6)]
    assert held_out == [[0, 6, 7, 13], [3, 8, 10], [1, 5], [4, 9], [12], [2]]
    level = stratified_folds(LABELS, 6, seed=637381822, level=True)
    assert level == [0, 2, 5, 0, 4, 3, 1, 0, 1, 3, 2, -1, 4, 5]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shots", [1, 3])
def test_shots_are_sampled_of_each_class_in_the_order_of_the_data(shots: int, seed: int) -> None:
    labels = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0]
    chosen = sample_shots(labels, shots, seed, ["a", "b", "c"])
    assert chosen == sorted(set(chosen))
    assert sorted(labels[index] for index in chosen) == sorted([0, 1, 2] * shots)
    assert chosen == sample_shots(labels, shots, seed, ["a", "b", "c"])


def test_other_seeds_sample_other_shots() -> None:
    samples = {tuple(sample_shots([0, 1] * 20, 2, seed, ["dog", "cat"])) for seed in range(10)}
    assert len(samples) > 5


def test_more_shots_contain_the_fewer_of_the_same_seed() -> None:
    labels = [index % 2 for index in range(40)]
    assert set(sample_shots(labels, 2, 0, ["dog", "cat"])) < set(sample_shots(labels, 5, 0, ["dog", "cat"]))


def test_every_class_with_too_few_examples_is_named() -> None:
    with pytest.raises(PimergeError) as caught:
        sample_shots([0, 0, 0, 1, 2], 2, 0, ["a", "b", "c"])
    [problem] = caught.value.problems
    assert problem.message == "2 of 3 classes have too few examples, 2 were asked for: 'b' (1), 'c' (1)"
    assert "--up-to-shots" in problem.hint


def test_up_to_shots_takes_what_there_is() -> None:
    labels = [0, 0, 0, 1, 2, 0]
    chosen = sample_shots(labels, 2, 0, ["a", "b", "c", "d"], up_to=True)
    assert [labels[index] for index in chosen].count(0) == 2
    assert {3, 4} <= set(chosen)
    assert len(chosen) == 4
    assert sample_shots([0, 0], 5, 0, [], up_to=True) == [0, 1]
    held: list[set[int]] = [{0}, {0, 1}, {0}]
    assert sample_sentences(held, 2, 0, ["O", "X"], up_to=True).count(1) == 1


def test_less_than_one_shot_is_refused() -> None:
    with pytest.raises(PimergeError, match="--shots must be at least 1; got 0"):
        sample_shots([0, 1], 0, 0, ["dog", "cat"])
