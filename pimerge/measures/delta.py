"""Cosine of the updates ΔW, through the factors; it does not depend on rank, init or basis.

⟨ΔW_a, ΔW_b⟩ = s_a s_b Σ (B_aᵀB_b) ⊙ (A_aA_bᵀ), summed over modules, so no ΔW is formed. A module that only
one of the two adapts contributes to its norm alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pimerge.expert import Expert

NEEDS = "delta"
SAME_BASIS = False


def scores(target: Expert, candidates: Sequence[Expert]) -> list[float]:
    """cos(ΔW_target, ΔW_n) over all modules, in [−1, 1]; 0 if one of them is zero."""
    own = inner_product(target, target)
    cosines = []
    for candidate in candidates:
        norms = (own * inner_product(candidate, candidate)) ** 0.5
        cosine = inner_product(target, candidate) / norms if norms > 0 else 0.0
        cosines.append(min(1.0, max(-1.0, cosine)))
    return cosines


def inner_product(first: Expert, second: Expert) -> float:
    """Σ over shared modules of ⟨ΔW_a, ΔW_b⟩, in float64."""
    total = 0.0
    for module in sorted(first.modules.keys() & second.modules.keys()):
        a, b = first.factors(module), second.factors(module)
        products = (a.B.double().T @ b.B.double()) * (a.A.double() @ b.A.double().T)
        total += a.scaling * b.scaling * float(products.sum())
    return total
