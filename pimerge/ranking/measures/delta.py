"""Cosine of the updates ΔW around the pool's mean, by the factors; for any rank, init and basis.

⟨ΔW_a, ΔW_b⟩ = s_a s_b Σ (B_aᵀB_b) ⊙ (A_aA_bᵀ), summed over modules, is computed through the factors without forming any
ΔW. A module that only one of two experts adapts contributes only to the norm. The pool's mean update is subtracted,
since the part that all experts share does not tell which of them are similar.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pimerge.embedding.store_view import StoreView, by_name
from pimerge.ranking.cosine import InnerProducts, Similarity, from_products
from pimerge.ranking.measure import Measure, Needs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Update = tuple[Array, Array]


def similarity(members: Sequence[StoreView], candidates: int, pool: Sequence[int], sampled: bool = False) -> Similarity:
    """Compute the cosines of ΔW_target − Δ̄ and ΔW_n − Δ̄ over all modules, with Δ̄ the mean of the ``pool``."""
    modules = sorted({name for member in members for name in member.expert.modules})

    def by_module() -> Iterator[tuple[str, InnerProducts]]:
        for module, updates in by_name(members, modules, _updates):
            target, norms, total = _products(updates, len(members), pool)
            yield module, InnerProducts.around(target, norms, total, candidates, pool, sampled)

    return from_products(by_module(), candidates)


def _updates(member: StoreView, modules: Sequence[str]) -> dict[str, Update]:
    return member.expert.updates(name for name in modules if name in member.expert.modules)


def _products(updates: Mapping[int, Update], count: int, pool: Sequence[int]) -> tuple[Array, Array, Array]:
    """Return (count) inner products of the updates of a module with the target's, themselves and the pool's sum.

    Args:
        updates: member → its update, for the members that adapt the module.
        count: number of members.
    """
    owners = list(updates)
    A, B = (_stacked([update[factor] for update in updates.values()]) for factor in (0, 1))

    def by_member(values: Array) -> Array:
        """(owners × r) → (count) sums over the rank; 0 for a member without the module."""
        found = np.zeros(count)
        found[owners] = values.sum(1)
        return found

    def with_sum(members: Sequence[int]) -> Array:
        """(count) the inner products with the sum of some members' updates."""
        places = [owners.index(index) for index in members if index in updates]
        A_sum, B_sum = _rows(A[places]), _rows(B[places])
        # multi_dot chooses the cheaper order, which forms a dense ΔW only if the summed ranks exceed its width
        products = np.linalg.multi_dot([_rows(B), B_sum.T, A_sum])
        return by_member(np.einsum("ij,ij->i", products, _rows(A)).reshape(A.shape[:2]))

    norms = by_member(((B @ B.swapaxes(1, 2)) * (A @ A.swapaxes(1, 2))).sum(2))
    return with_sum([0]), norms, with_sum(pool)


def _stacked(factors: Sequence[Array]) -> Array:
    """Stack factors as (members × r × d), with r the highest rank; smaller ones are padded with zeros."""
    stack = np.zeros((len(factors), max(map(len, factors)), factors[0].shape[1]))
    for place, factor in zip(stack, factors, strict=True):
        place[: len(factor)] = factor
    return stack


def _rows(stack: Array) -> Array:
    """(members × r × d) → (members · r × d)."""
    return stack.reshape(-1, stack.shape[2])


MEASURE = Measure(
    name="delta",
    summary="Cosine of the updates ΔW around the pool's mean, by the factors; for any rank, init and basis.",
    needs=Needs.EXPERTS,
    similarity=similarity,
    needs_update=True,
)
