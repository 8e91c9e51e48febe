"""The plane through three experts, and the coordinates of their weighted sums in it.

A point of the plane is w_0 ΔW_0 + w_1 ΔW_1 + w_2 ΔW_2 with weights that sum to 1. Its coordinates (x, y) refer to an
orthonormal basis whose first vector is along ΔW_1 − ΔW_0, so lengths and angles in the picture are those of the
updates. All inner products are computed through the factors without forming ΔW.
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
    """Return module → (n × n) ⟨ΔW_a, ΔW_b⟩ = Σ (B_aᵀB_b) ⊙ (A_aA_bᵀ); for kinds without ΔW by tensor set."""
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
    """Return A (r × d_in) and s · Bᵀ (r × d_out); for a tensor set its numbers (1 × n) and a 1."""
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
        basis: (2 × 2) coordinates of ΔW_1 − ΔW_0 and ΔW_2 − ΔW_0 as rows; the first has y = 0.
    """

    products: Mapping[str, Array]
    basis: Array

    @classmethod
    def through(cls, experts: Sequence[Expert]) -> Plane:
        """Build the plane through three experts."""
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
        """Convert (n × 2) coordinates to (n × 3) weights that sum to 1."""
        later = np.linalg.solve(self.basis.T, places.T).T
        weights: Array = np.column_stack([1 - later.sum(1), later])
        return weights

    def place(self, weights: Mapping[str, Sequence[float]]) -> tuple[Array, float]:
        """Project a sum with different weights in each module onto the plane.

        Args:
            weights: module → weights of the three experts; a missing module has no update.

        Returns:
            the coordinates (2) of the nearest point of the plane, and the distance to it relative to the distance to
            ΔW_0 (0 in the plane).
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
