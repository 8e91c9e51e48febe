"""Laws that every measure keeps, by what it needs."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pimerge.adapters.expert import open_expert
from pimerge.embedding.features import TargetFeatures
from pimerge.embedding.store_view import StoreView
from pimerge.ranking import measures
from pimerge.ranking.measure import BY_EXAMPLES, BY_FILES, BY_STORE, MEASURES, Measure, Needs
from tests.support.experts import MakeExpert, edit_tensors
from tests.support.samples import stored

COUNT = 5
OF_THE_STORE = [measure for measure in MEASURES if measure.compares_embeddings]
OF_EXAMPLES = [measure for measure in MEASURES if measure.needs is Needs.EXAMPLES]
OF_HISTORY = [measure for measure in MEASURES if measure.needs is Needs.HISTORY]
AROUND_A_MEAN = [measure for measure in OF_THE_STORE if measure.threshold >= 0]
NOT_HELD_OUT = [measure for measure in OF_EXAMPLES if not measure.held_out]
GAINS = [measure for measure in OF_EXAMPLES if measure.is_gain]


def named(measures: Sequence[Measure]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("measure", measures, ids=lambda measure: str(measure.name))


def test_every_measure_is_covered_here() -> None:
    assert sorted(each.name for each in OF_THE_STORE + OF_EXAMPLES + OF_HISTORY) == MEASURES.names()
    assert {BY_EXAMPLES, BY_STORE, BY_FILES} <= set(MEASURES.names())
    assert [MEASURES.load(BY_EXAMPLES)] == GAINS


@pytest.mark.parametrize("name", MEASURES.names())
def test_a_measure_has_the_function_of_what_it_needs_alone(name: str) -> None:
    measure = MEASURES.load(name)
    functions = {
        "similarity": measure.compares_embeddings,
        "scores": measure.needs is Needs.EXAMPLES,
        "predict": measure.needs is Needs.HISTORY,
    }
    defaults = {field.name: field.default for field in fields(Measure)}
    assert {field: getattr(measure, field) is not defaults[field] for field in functions} == functions
    assert measure.requirements.startswith(measure.needs.text)


def test_a_file_in_a_folder_of_the_package_is_a_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "constant_score.py").write_text(
        "from pimerge.ranking.measure import Measure, Needs\n\n"
        "def scores(features, weights):\n    return weights.new_zeros(len(weights))\n\n"
        'MEASURE = Measure(name="constant-score", summary="Zero.", needs=Needs.EXAMPLES, scores=scores)\n'
    )
    monkeypatch.setattr(measures, "__path__", [*measures.__path__, str(tmp_path)])
    assert "constant-score" in MEASURES.names()
    measure = MEASURES.load("constant_score")
    assert measure in list(MEASURES)
    assert once(measure, sample_of(1.0)) == 0
    monkeypatch.delitem(sys.modules, "pimerge.ranking.measures.constant_score")


def set_to_zero(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.zero_()


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, vit_base: Path) -> list[StoreView]:
    """Several experts of one form and init in a store; the last one is zero."""
    folder = tmp_path_factory.mktemp("pool")
    experts = [open_expert(make_expert(folder / str(seed), vit_base, seed=seed)) for seed in range(COUNT)]
    zero = open_expert(edit_tensors(make_expert(folder / "zero", vit_base), set_to_zero))
    return [
        *(stored(folder / f"store{seed}", expert, seed) for seed, expert in enumerate(experts)),
        stored(folder / "store-zero", zero, 0, scale=0.0),
    ]


@pytest.fixture
def pool(members: list[StoreView]) -> list[StoreView]:
    return members[:COUNT]


@pytest.fixture
def zero(members: list[StoreView]) -> StoreView:
    return members[COUNT]


def scores(measure: Measure, target: StoreView, candidates: Sequence[StoreView]) -> list[float]:
    """Of all candidates, with the mean of them and the target."""
    similarity = measure.similarity([target, *candidates], len(candidates), range(1 + len(candidates)))
    found: list[float] = similarity.scores().tolist()
    return found


@named(OF_THE_STORE)
def test_every_score_is_finite_and_in_order(measure: Measure, pool: list[StoreView]) -> None:
    found = scores(measure, pool[0], pool[1:])
    assert len(set(found)) == COUNT - 1
    assert all(isinstance(score, float) and math.isfinite(score) and abs(score) <= 1 for score in found)


@named(OF_THE_STORE)
def test_scores_are_the_sums_of_their_contributions(measure: Measure, pool: list[StoreView]) -> None:
    similarity = measure.similarity(pool, COUNT - 1, range(COUNT))
    assert similarity.contributions().shape == (COUNT - 1, len(similarity.tensors))
    np.testing.assert_allclose(similarity.contributions().sum(1), similarity.scores(), rtol=1e-7, atol=1e-7)
    assert (similarity.errors() >= 0).all()
    assert np.isfinite(similarity.errors()).all()


@named(OF_THE_STORE)
def test_the_order_of_the_candidates_does_not_matter(measure: Measure, pool: list[StoreView]) -> None:
    forwards = scores(measure, pool[0], pool[1:])
    assert scores(measure, pool[0], pool[:0:-1])[::-1] == pytest.approx(forwards, abs=1e-12)


@named(OF_THE_STORE)
def test_two_experts_of_a_pool_are_as_close_to_each_other_from_either_side(
    measure: Measure, pool: list[StoreView]
) -> None:
    first, second, *rest = pool
    there, back = scores(measure, first, [second, *rest])[0], scores(measure, second, [first, *rest])[0]
    assert there == pytest.approx(back, abs=1e-12)


@named(OF_THE_STORE)
def test_nothing_is_closer_than_an_identical_copy(measure: Measure, pool: list[StoreView]) -> None:
    twin, *others = scores(measure, pool[0], [pool[0], *pool[1:]])
    assert twin == pytest.approx(1)
    assert twin > max(others)


@named(OF_THE_STORE)
def test_members_of_the_pool_that_are_not_candidates_only_move_the_mean(
    measure: Measure, pool: list[StoreView]
) -> None:
    few = measure.similarity(pool, 2, range(COUNT)).scores().tolist()
    assert few == pytest.approx(scores(measure, pool[0], pool[1:])[:2], abs=1e-12)


@named(AROUND_A_MEAN)
def test_whether_the_pool_is_a_sample_matters_only_to_its_mean(measure: Measure, pool: list[StoreView]) -> None:
    whole, sample = (measure.similarity(pool, COUNT - 1, range(COUNT), sampled).scores() for sampled in (False, True))
    assert (np.abs(sample) <= 1).all()
    assert (sample < whole).all()


@named([measure for measure in OF_THE_STORE if measure not in AROUND_A_MEAN])
def test_without_a_mean_the_rest_of_the_pool_does_not_matter(measure: Measure, pool: list[StoreView]) -> None:
    whole, sample, none = (
        measure.similarity(pool, COUNT - 1, members, sampled).scores()
        for members, sampled in ((range(COUNT), False), (range(COUNT), True), ([], False))
    )
    assert np.array_equal(sample, whole)
    assert np.array_equal(none, whole)


@named(OF_THE_STORE)
def test_a_pool_of_one_has_a_score(measure: Measure, pool: list[StoreView]) -> None:
    (score,) = scores(measure, pool[0], pool[1:2])
    assert math.isfinite(score)
    assert scores(measure, pool[0], pool[:1]) == [pytest.approx(1)]


@named(OF_THE_STORE)
def test_zero_is_finite_on_either_side(measure: Measure, pool: list[StoreView], zero: StoreView) -> None:
    assert all(map(math.isfinite, scores(measure, pool[0], [zero, *pool[1:]])))
    assert all(map(math.isfinite, scores(measure, zero, pool)))
    assert scores(measure, zero, [zero]) == [0]
    assert scores(measure, pool[0], [zero]) == [0]
    assert scores(measure, zero, [zero, zero, zero]) == [0, 0, 0]


@named(OF_THE_STORE)
def test_a_pool_of_copies_is_finite(measure: Measure, pool: list[StoreView]) -> None:
    found = scores(measure, pool[0], [pool[0]] * 3)
    assert all(map(math.isfinite, found))
    assert max(found) == min(found)
    assert found[0] in (0, pytest.approx(1))  # around their mean all of them are nothing


@named(OF_THE_STORE)
def test_the_same_again_and_the_files_are_as_they_were(measure: Measure, pool: list[StoreView]) -> None:
    files = [
        file.path for member in pool for file in (member.expert.file, member.diagonal, member.second_moments) if file
    ]
    before = [path.read_bytes() for path in files]
    first = scores(measure, pool[0], pool[1:])
    assert scores(measure, pool[0], pool[1:]) == first
    assert [path.read_bytes() for path in files] == before


# Only where no example is held out is a weight a repetition and the order free: a copy would be trained on, and the
# folds are dealt out in the order of the examples.
N, CLASSES = 60, 3


def sample_of(signal: float, seed: int = 0) -> TargetFeatures:
    """Three clusters, overlapping the more the weaker the signal; a head and losses to match."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(N) % CLASSES
    centres, noise = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (CLASSES, N))
    logits = torch.randn(N, 4, generator=generator) + signal * torch.eye(4)[labels]
    losses = -logits[:, :CLASSES].log_softmax(1)[torch.arange(N), labels]
    return TargetFeatures(1 + noise + signal * centres[labels], labels, CLASSES, logits, losses)


def rows_of(sample: TargetFeatures, rows: Tensor) -> TargetFeatures:
    assert sample.logits is not None
    assert sample.losses is not None
    return TargetFeatures(
        sample.vectors[rows], sample.labels[rows], sample.classes, sample.logits[rows], sample.losses[rows]
    )


def once(measure: Measure, sample: TargetFeatures) -> float:
    return float(measure.scores(sample, torch.ones(1, len(sample.labels), dtype=torch.float64)))


def draws_of(count: int = 5) -> Tensor:
    """How often each example is drawn, every class among them."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(N, (count, N), generator=generator)
    return torch.stack([row.bincount(minlength=N) for row in drawn])


@named(OF_EXAMPLES)
def test_a_measure_of_examples_gives_a_finite_score_for_each_draw(measure: Measure) -> None:
    found = measure.scores(sample_of(1.0), draws_of().double())
    assert found.shape == (5,)
    assert found.dtype == torch.float64
    assert found.isfinite().all()
    assert len(set(found.tolist())) == 5


@named(OF_EXAMPLES)
def test_what_tells_the_labels_is_better_than_what_does_not(measure: Measure) -> None:
    for seed in range(3):
        informative = sample_of(2.0, seed)
        shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
        mixed = rows_of(informative, shuffled)
        assert mixed.logits is not None
        losses = -mixed.logits[:, :CLASSES].log_softmax(1)[torch.arange(N), informative.labels]
        worse = TargetFeatures(mixed.vectors, informative.labels, CLASSES, mixed.logits, losses)
        assert once(measure, informative) > once(measure, worse)


@named(NOT_HELD_OUT)
def test_a_whole_weight_is_a_repetition(measure: Measure) -> None:
    sample, draws = sample_of(1.0), draws_of()
    repeated = [once(measure, rows_of(sample, torch.arange(N).repeat_interleave(draw))) for draw in draws]
    assert measure.scores(sample, draws.double()).tolist() == pytest.approx(repeated, abs=1e-7)


@named(NOT_HELD_OUT)
def test_the_order_of_the_examples_does_not_matter(measure: Measure) -> None:
    sample = sample_of(1.0)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    assert once(measure, rows_of(sample, order)) == pytest.approx(once(measure, sample), abs=1e-8)


@named(OF_EXAMPLES)
def test_the_sample_is_left_as_it_was(measure: Measure) -> None:
    sample, weights = sample_of(1.0), draws_of().double()
    before, drawn = copy.deepcopy(sample), weights.clone()
    first = measure.scores(sample, weights)
    assert torch.equal(measure.scores(sample, weights), first)
    assert torch.equal(weights, drawn)
    for name, value in vars(before).items():
        assert torch.equal(torch.as_tensor(getattr(sample, name)), torch.as_tensor(value)), name


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
@named(OF_EXAMPLES)
def test_constant_features_are_finite(measure: Measure, value: float) -> None:
    sample = sample_of(1.0)
    constant = TargetFeatures(
        torch.full((N, 8), value, dtype=torch.float64), sample.labels, CLASSES, sample.logits, sample.losses
    )
    assert measure.scores(constant, draws_of().double()).isfinite().all()


@named(GAINS)
def test_the_base_itself_is_expected_to_gain_nothing(measure: Measure) -> None:
    base, twin = sample_of(0.5), sample_of(0.5)
    weights = draws_of().double()
    assert (measure.scores(twin, weights) - measure.scores(base, weights)).abs().max() == 0
    assert once(measure, sample_of(2.0)) > once(measure, base)


@named(OF_HISTORY)
def test_a_prediction_is_within_the_gains_and_independent_of_their_order(measure: Measure) -> None:
    generator = torch.Generator().manual_seed(0)
    targets, sources = [f"t{i}" for i in range(5)], [f"s{i}" for i in range(3)]
    gains = {
        target: {
            source: dict(zip((0.5, 1.0), torch.randn(2, generator=generator).tolist(), strict=True))
            for source in sources
        }
        for target in targets
    }
    similarities = {target: i / 5 for i, target in enumerate(targets)}
    before = copy.deepcopy(gains)
    for source in sources:
        found = measure.predict(gains, similarities, source)
        assert found is not None
        scale, gain, error = found
        of_scale = [gains[target][source][scale] for target in targets]
        assert min(of_scale) <= gain <= max(of_scale)
        assert 0 <= error < math.inf
        assert measure.predict(dict(reversed(gains.items())), similarities, source) == pytest.approx(found, abs=1e-12)
    assert gains == before
