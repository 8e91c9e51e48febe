"""The laws of merging, asserted of every method that does not excuse itself, and denied of every one that does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pimerge.core.errors import PimergeError
from pimerge.merging.method import METHODS, MergeMethod, Space
from pimerge.merging.methods._weights import ratios
from tests.support.merge_cases import F64, seeded
from tests.support.merge_references import reference_bases
from tests.support.numerics import normal

EVERY = list(METHODS)
LAWS = {"identity", "copies", "order", "gauge"}
NEEDS = {"inner", "limit", "generators", "fishers", "grams"}

LOSSLESS: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"density": 1.0},
    "core-space": {"density": 1.0},
    "dare-linear": {"density": 1.0},
    "dare-ties": {"density": 1.0},
    "della": {"density": 1.0},
    "knots": {"density": 1.0},
    "magnitude": {"density": 1.0},
    "ties": {"density": 1.0},
}
"""Options at which identity and copies hold again."""


@pytest.fixture(params=EVERY, ids=lambda method: method.name)
def method(request: pytest.FixtureRequest) -> MergeMethod:
    """Each method."""
    found: MergeMethod = request.param
    return found


def those(chosen: Callable[[MergeMethod], bool]) -> pytest.MarkDecorator:
    """Only the methods that a law is about, in place of all."""
    return pytest.mark.parametrize("method", filter(chosen, EVERY), ids=lambda method: method.name)


@dataclass(frozen=True)
class Pool:
    """Experts of one module, with all that a method may need.

    Attributes:
        factors: (B_n, A_n) per expert.
        weights: one per expert.
        seeds: of the experts' random draws.
        fishers: those of ΔW, (experts, d_out, d_in).
        grams: of the layer's inputs, per expert.
    """

    factors: Sequence[tuple[Tensor, Tensor]]
    weights: Tensor
    fishers: Tensor
    grams: Sequence[Tensor]
    seeds: Sequence[int]

    @property
    def deltas(self) -> Tensor:
        """ΔW: (experts, d_out, d_in)."""
        return torch.stack([B @ A for B, A in self.factors])

    def taken(self, order: Sequence[int]) -> Pool:
        """The experts of these indices."""
        return Pool(
            [self.factors[n] for n in order],
            self.weights[list(order)],
            self.fishers[list(order)],
            [self.grams[n] for n in order],
            [self.seeds[n] for n in order],
        )


def pool(count: int, shape: tuple[int, int] = (6, 5), rank: int = 2) -> Pool:
    """Experts by a seed, with weights of sum 1."""
    d_out, d_in = shape
    inputs = [normal(8, d_in, seed=300 + n).to(F64) for n in range(count)]
    weights = torch.arange(1, count + 1, dtype=F64)
    return Pool(
        [(normal(d_out, rank, seed=n).to(F64), normal(rank, d_in, seed=100 + n).to(F64)) for n in range(count)],
        weights / weights.sum(),
        normal(count, d_out, d_in, seed=200).to(F64).square(),
        [X.mT @ X for X in inputs],
        range(count),
    )


def several(method: MergeMethod) -> int:
    """Three experts, or two for a method that takes no more."""
    with suppress(PimergeError):
        method.weights(3, [0.2, 0.3, 0.5])
        return 3
    with suppress(PimergeError):
        method.weights(3, None)
        return 3
    return 2


def merged(method: MergeMethod, experts: Pool, deltas: Tensor | None = None, **options: Any) -> Tensor:
    """The merged ΔW by the method's space: of dense updates, unless it wants the reference bases."""
    dense = experts.deltas if deltas is None else deltas
    weights = experts.weights
    given: dict[str, Any] = {
        "inner": torch.einsum("nij,mij->nm", dense, dense),
        "limit": min(dense.shape[1:]),
        "generators": [torch.Generator().manual_seed(seed) for seed in experts.seeds],
        "fishers": experts.fishers,
        "grams": experts.grams,
    }
    needed = {need: given[need] for need in method.needs} | options
    if method.coefficients:
        return torch.tensordot(method.coefficients(weights, **needed).to(dense), dense, dims=1)
    if method.transformed:
        return torch.stack(method.transformed(list(dense), weights, **needed)).sum(0)
    if method.space is Space.REFERENCE and deltas is None:
        U, V = map(torch.as_tensor, reference_bases(experts.factors))
        found: Tensor = U @ method.function(U.mT @ dense @ V, weights, **needed) @ V.mT
        return found
    return method.function(dense, weights, **needed)  # type: ignore[no-any-return]


def copies(method: MergeMethod) -> Pool:
    """One expert several times, with the data and the draws of several."""
    experts = pool(several(method))
    return replace(experts, factors=[experts.factors[0]] * len(experts.factors))


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding."""
    return bool((found - expected).norm() <= 1e-10 * expected.norm())


def test_it_has_the_one_function_of_its_space(method: MergeMethod) -> None:
    functions = {Space.LINEAR: method.coefficients, Space.INPUTS: method.transformed}
    assert functions.get(method.space, method.merge) is method.function
    assert sum(function is not None for function in (method.coefficients, method.transformed, method.merge)) == 1


def test_it_says_what_it_is(method: MergeMethod) -> None:
    assert all((method.summary, method.formula, method.paper))
    assert set(method.needs) <= NEEDS
    assert set(method.breaks) <= LAWS
    assert all(method.breaks.values())


def test_its_keywords_are_its_needs_and_its_options(method: MergeMethod) -> None:
    keywords = [p for p in inspect.signature(method.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert {p.name for p in keywords if p.default is p.empty} == set(method.needs)
    assert {p.name: p.default for p in keywords if p.default is not p.empty} == method.defaults
    assert not [option.problem(default) for option, default in method.options.items() if option.problem(default)]


def test_options_of_one_name_have_one_type_and_help() -> None:
    options = list(METHODS.options())
    assert len({(option.name, option.type, option.help, option.flag) for option in options}) == len(
        {option.name for option in options}
    )


def test_it_accepts_given_weights_or_none_and_has_one_finite_number_per_expert(method: MergeMethod) -> None:
    accepted = []
    for given in (None, [0.2, 0.8]):
        with suppress(PimergeError):
            accepted.append(method.weights(2, given))
    assert accepted
    assert all(len(weights) == 2 and torch.tensor(weights).isfinite().all() for weights in accepted)


@those(lambda method: not method.weights_by_score)
def test_a_single_expert_weighs_one_unless_weights_are_asked_for(method: MergeMethod) -> None:
    assert method.weights(1, None) == [1.0]


@those(lambda method: method.weights is ratios)
@pytest.mark.parametrize("given", [[0.5, -1.0], [0.0, 0.0]])
def test_weights_of_which_the_ratios_count_are_not_negative(method: MergeMethod, given: list[float]) -> None:
    with pytest.raises(PimergeError, match=r"the weights are 0(\.5, -1|, 0)\n.*none below 0"):
        method.weights(2, given)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_result_has_the_shape_and_dtype_of_one_update(method: MergeMethod, dtype: torch.dtype) -> None:
    experts = pool(several(method))
    result = merged(method, experts, experts.deltas.to(dtype))
    assert (result.shape, result.dtype) == ((6, 5), dtype)
    assert result.isfinite().all()
    torch.testing.assert_close(result.double(), merged(method, experts, experts.deltas), rtol=0, atol=1e-4)


def test_the_inputs_stay_as_they_were_and_the_result_is_the_same_twice(method: MergeMethod) -> None:
    count = several(method)
    experts, untouched = pool(count), pool(count)
    deltas = experts.deltas
    first, second = merged(method, experts, deltas), merged(method, experts, deltas)
    assert torch.equal(first, second)
    assert torch.equal(deltas, untouched.deltas)
    assert torch.equal(experts.weights, untouched.weights)
    assert torch.equal(experts.fishers, untouched.fishers)
    assert all(map(torch.equal, experts.grams, untouched.grams))


def test_identity_one_expert_at_weight_one_comes_back(method: MergeMethod) -> None:
    holds = same(merged(method, pool(1)), pool(1).deltas[0])
    assert holds == ("identity" not in method.breaks)


def test_copies_with_weights_of_sum_one_give_the_expert(method: MergeMethod) -> None:
    holds = same(merged(method, copies(method)), pool(1).deltas[0])
    assert holds == ("copies" not in method.breaks)


@pytest.mark.parametrize("lossless", LOSSLESS)
def test_without_trimming_identity_and_copies_hold(lossless: str) -> None:
    method, options = METHODS.load(lossless), LOSSLESS[lossless]
    assert same(merged(method, pool(1), **options), pool(1).deltas[0])
    assert same(merged(method, copies(method), **options), pool(1).deltas[0])


def test_order_of_the_experts_does_not_matter(method: MergeMethod) -> None:
    experts = pool(several(method))
    turned = experts.taken([*range(1, len(experts.factors)), 0])
    holds = same(merged(method, turned), merged(method, experts))
    assert holds == ("order" not in method.breaks)


def test_gauge_other_factors_of_the_same_updates_give_the_same_merge(method: MergeMethod) -> None:
    experts = pool(several(method))
    bases = [normal(2, 2, seed=400 + n).to(F64) for n in range(len(experts.factors))]
    changed = [(B @ R, torch.linalg.solve(R, A)) for (B, A), R in zip(experts.factors, bases, strict=True)]
    if method.space is Space.FACTORS:
        # it merges B and A apart, with a Fisher that follows the change of basis
        found = _by_factors(method, changed, experts.weights)
        expected = _by_factors(method, experts.factors, experts.weights)
    else:
        found, expected = merged(method, replace(experts, factors=changed)), merged(method, experts)
    assert same(found, expected) == ("gauge" not in method.breaks)


def _by_factors(method: MergeMethod, factors: Sequence[tuple[Tensor, Tensor]], weights: Tensor) -> Tensor:
    B, A = (torch.stack(parts) for parts in zip(*factors, strict=True))
    found: Tensor = method.function(B, weights, fishers=B.square()) @ method.function(A, weights, fishers=A.square())
    return found


def test_zero_updates_give_zero(method: MergeMethod) -> None:
    experts = pool(several(method))
    assert not merged(method, experts, torch.zeros_like(experts.deltas)).any()


def test_a_zero_update_among_others_gives_finite_numbers(method: MergeMethod) -> None:
    experts = pool(several(method))
    deltas = experts.deltas
    deltas[0] = 0
    assert merged(method, experts, deltas).isfinite().all()
    assert merged(method, experts, deltas).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_a_module_may_be_tiny(method: MergeMethod, shape: tuple[int, int]) -> None:
    result = merged(method, pool(several(method), shape, rank=1))
    assert result.shape == shape
    assert result.isfinite().all()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_it_scales_with_the_updates(method: MergeMethod, scale: float) -> None:
    experts = pool(several(method))
    assert same(merged(method, experts, scale * experts.deltas), scale * merged(method, experts, experts.deltas))


@those(lambda method: method.space in (Space.LINEAR, Space.SPECTRAL, Space.ROWS))
def test_it_commutes_with_the_rotations_that_its_space_promises(method: MergeMethod) -> None:
    experts = pool(several(method))
    left = torch.linalg.qr(normal(6, 6, seed=1).to(F64)).Q
    right = torch.eye(5, dtype=F64) if method.space is Space.ROWS else torch.linalg.qr(normal(5, 5, seed=2).to(F64)).Q
    rotated = merged(method, experts, left @ experts.deltas @ right.mT)
    assert same(rotated, left @ merged(method, experts) @ right.mT)


@those(lambda method: method.space in (Space.ELEMENTWISE, Space.FACTORS))
def test_elementwise_methods_take_tensors_of_any_number_of_dimensions(method: MergeMethod) -> None:
    needs = method.needs
    for shape in ((12,), (2, 3, 2)):
        deltas = normal(3, *shape).to(F64)
        needed = {"generators": seeded(3)} if "generators" in needs else {}
        needed |= {"fishers": deltas.square()} if "fishers" in needs else {}
        result = method.function(deltas, torch.full((3,), 1 / 3, dtype=F64), **needed)
        assert result.shape == shape
        assert result.isfinite().all()


@those(lambda method: "scale" in method.defaults)
def test_an_option_scale_scales_the_result(method: MergeMethod) -> None:
    experts = pool(several(method))
    assert same(merged(method, experts, scale=-2.5), -2.5 * merged(method, experts))
