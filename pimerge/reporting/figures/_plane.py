"""The plane through three experts, and where a sum of them lies in it.

A point of the plane is w_0 ΔW_0 + w_1 ΔW_1 + w_2 ΔW_2 with weights that sum to 1. Its coordinates (x, y) are those of
an orthonormal basis that begins with ΔW_1 − ΔW_0, so that lengths and angles in the picture are those of the updates.
All inner products are taken through the factors: no dense ΔW is formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pimerge.adapters.expert import Expert

    Array = NDArray[np.float64]

_LINE = 1e-6
DIFFERENCES = np.array([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
"""Weights of ΔW_1 − ΔW_0 and of ΔW_2 − ΔW_0."""


def inner_products(experts: Sequence[Expert]) -> dict[str, Array]:
    """Module → (n × n) ⟨ΔW_a, ΔW_b⟩ = Σ (B_aᵀB_b) ⊙ (A_aA_bᵀ); of a kind without ΔW, of the tensors of each group."""
    found = {}
    for name in sorted({part for expert in experts for part in expert.parts}):
        gram = np.zeros((len(experts), len(experts)))
        owners = [index for index, expert in enumerate(experts) if name in expert.parts]
        factors = {index: _factors(experts[index], name) for index in owners}
        for one in owners:
            for other in owners:
                (A, B), (C, D) = factors[one], factors[other]
                gram[one, other] = ((A @ C.T) * (B @ D.T)).sum()
        found[name] = gram
    return found


def _factors(expert: Expert, name: str) -> tuple[Array, Array]:
    """A (r × d_in) and s · Bᵀ (r × d_out); of a group its numbers (1 × n) and a 1."""
    if expert.modules:
        return expert.updates([name])[name]
    from pimerge.adapters.tensor_sets import read_slot

    slots = expert.tensor_sets[name].slots.values()
    numbers = [read_slot(slot, expert.tensor).double().flatten().numpy() for slot in slots]
    return np.concatenate(numbers)[None], np.ones((1, 1))


@dataclass(frozen=True)
class Plane:
    """The plane of three experts.

    Attributes:
        products: module → (3 × 3) inner products.
        basis: (2 × 2), rows are the coordinates of ΔW_1 − ΔW_0 and ΔW_2 − ΔW_0; the first has y = 0.
    """

    products: Mapping[str, Array]
    basis: Array

    @classmethod
    def through(cls, experts: Sequence[Expert]) -> Plane:
        """The plane through three experts."""
        products = inner_products(experts)
        square = DIFFERENCES @ sum(products.values(), np.zeros((3, 3))) @ DIFFERENCES.T  # (2 × 2)
        x = float(np.sqrt(max(square[0, 0], 0.0)))
        along = float(square[0, 1] / x) if x > 0 else 0.0
        rest = square[1, 1] - along**2
        if not x > 0 or rest <= _LINE * square[1, 1]:
            names = ", ".join(expert.name for expert in experts)
            raise PimergeError(
                f"the updates of {names} lie on one line, so no plane goes through them", "name three other experts"
            )
        return cls(products, np.array([[x, 0.0], [along, float(np.sqrt(rest))]]))

    def weights(self, places: Array) -> Array:
        """(n × 2) coordinates → (n × 3) weights that sum to 1."""
        later = np.linalg.solve(self.basis.T, places.T).T
        weights: Array = np.column_stack([1 - later.sum(1), later])
        return weights

    def place(self, weights: Mapping[str, Sequence[float]]) -> tuple[Array, float]:
        """Where a sum with its own weights in each module lies, and how far from the plane.

        Args:
            weights: module → one for each of the three; a module that is not there has no update.

        Returns:
            the coordinates (2) of the nearest point of the plane, and the distance from it as a share of the distance
            from ΔW_0 (0: it lies in the plane).
        """
        along: Any = np.zeros(2)
        square = 0.0
        for name, gram in self.products.items():
            apart = np.array(weights.get(name, (0.0, 0.0, 0.0))) - np.array([1.0, 0.0, 0.0])
            along = along + DIFFERENCES @ gram @ apart
            square += float(apart @ gram @ apart)
        coordinates: Array = np.linalg.solve(self.basis, along)
        off = max(0.0, square - float(coordinates @ coordinates))
        return coordinates, float(np.sqrt(off / square)) if off > _LINE * square else 0.0
