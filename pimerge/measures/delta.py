"""Cosine of the updates ΔW around the pool's mean, through the factors; not bound to rank, init or basis.

⟨ΔW_a, ΔW_b⟩ = s_a s_b Σ (B_aᵀB_b) ⊙ (A_aA_bᵀ), summed over modules, so no ΔW is formed. A module that only
one of the two adapts contributes to its norm alone. What all experts share says nothing about which of them fit
each other, so the pool's mean update is subtracted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from pimerge.similarity import Products, Similarity, from_products, has_mean

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.kinds.lora import Factors
    from pimerge.store import Stored

NEEDS = "experts"
SAME_BASIS = False
GATE = 0.0


def similarity(members: Sequence[Stored], candidates: int, pool: Sequence[int]) -> Similarity:
    """The cosines of ΔW_target − Δ̄ and ΔW_n − Δ̄ over all modules, with Δ̄ the mean of the ``pool``."""
    return from_products(_by_module(members, 1 + candidates, pool))


def _by_module(members: Sequence[Stored], count: int, pool: Sequence[int]) -> Iterator[tuple[str, Products]]:
    """The inner products of the first ``count`` members, for each module that any member adapts."""
    experts = [member.expert for member in members]
    for module in sorted({name for expert in experts for name in expert.modules}):
        parts = {index: each.factors(module) for index, each in enumerate(experts) if module in each.modules}
        yield module, _products(parts, count, pool)


def _products(parts: Mapping[int, Factors], count: int, pool: Sequence[int]) -> Products:
    """The inner products in one module.

    Args:
        parts: member → its factors, of those that adapt the module.
    """
    owners = [index for index in parts if index < count]
    A, B = _stacked(parts, owners)

    def by_owner(values: Tensor) -> Tensor:
        """(owners × r) → (count) sums over the rank; 0 for a member without the module."""
        return torch.zeros(count, dtype=torch.float64).index_add_(0, torch.tensor(owners).long(), values.sum(1))

    def with_sum(A_sum: Tensor, B_sum: Tensor) -> Tensor:
        """(count) the inner products with the sum of some members' updates."""
        # in the cheaper order: through a dense ΔW only where the ranks add up to more than its width
        products = torch.linalg.multi_dot([B.flatten(0, 1), B_sum.flatten(0, 1).T, A_sum.flatten(0, 1)])
        return by_owner((products * A.flatten(0, 1)).sum(1).view(A.shape[:2]))

    mean, whole = torch.zeros(count, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    if has_mean(pool):
        of_pool = _stacked(parts, [index for index in pool if index in parts])
        A_pool, B_pool = (stack.flatten(0, 1) for stack in of_pool)
        mean = with_sum(*of_pool) / len(pool)
        whole = ((B_pool @ B_pool.T) * (A_pool @ A_pool.T)).sum() / len(pool) ** 2
    norms = by_owner(((B @ B.mT) * (A @ A.mT)).sum(2))
    return Products(with_sum(*_stacked(parts, [0] if 0 in parts else [])), norms, mean, whole)


def _stacked(parts: Mapping[int, Factors], members: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A (members × r × d_in) and sBᵀ (members × r × d_out) with r the highest rank; zeros fill up the others."""
    like = next(iter(parts.values()))
    if not members:
        return like.A.new_zeros(0, 1, like.A.shape[1]).double(), like.B.new_zeros(0, 1, len(like.B)).double()
    A = pad_sequence([parts[index].A.double() for index in members], batch_first=True)
    B = pad_sequence([parts[index].scaling * parts[index].B.T.double() for index in members], batch_first=True)
    return A, B
