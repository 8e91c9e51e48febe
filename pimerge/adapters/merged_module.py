"""The merged update of a module, and the error of its truncation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pimerge.adapters.lora_module import Factors, LoraModule


@dataclass(frozen=True)
class Summary:
    """Rank, scaling and errors of one merged module; see :class:`MergedModule`."""

    name: str
    rank: int
    energy: float
    lost: float
    coefficients: tuple[float, ...] | None
    rounding: float = 0.0
    scaling: float = 1.0

    @property
    def error(self) -> float:
        """‖ΔW − ΔW_r‖ / ‖ΔW‖, in [0, 1]."""
        return relative_error([self])

    @property
    def rounding_error(self) -> float:
        """‖ΔŴ_r − ΔW_r‖ / ‖ΔW‖."""
        return rounding_error([self])


@dataclass(frozen=True)
class MergedModule:
    """One module's merged update.

    Attributes:
        module: its layout, taken from an expert that has the module.
        factors: A (r × d_in), B (d_out × r), and the scaling that the config states.
        energy: ‖ΔW‖² before the truncation; 0 if nothing was truncated or rounded.
        lost: the part of the energy that the truncation dropped.
        rounding: ‖ΔŴ_r − ΔW_r‖², the energy of the error from rounding to a 16-bit dtype.
        coefficients: factor of each expert's update, for a linear method; None for any other.
    """

    module: LoraModule
    factors: Factors
    energy: float = 0.0
    lost: float = 0.0
    coefficients: tuple[float, ...] | None = None
    rounding: float = 0.0

    @property
    def summary(self) -> Summary:
        """Everything but the tensors."""
        rank, scaling = len(self.factors.A), self.factors.scaling
        return Summary(self.module.name, rank, self.energy, self.lost, self.coefficients, self.rounding, scaling)


def relative_error(parts: Sequence[Summary]) -> float:
    """The relative truncation error over some modules: √(Σ lost / Σ energy), ‖ΔW − ΔW_r‖ / ‖ΔW‖."""
    energy = sum(part.energy for part in parts)
    return (sum(part.lost for part in parts) / energy) ** 0.5 if energy > 0 else 0.0


def rounding_error(parts: Sequence[Summary]) -> float:
    """The relative error from rounding to a 16-bit dtype, ‖ΔŴ − ΔW‖ / ‖ΔW‖, over the modules that were rounded."""
    energy = sum(part.energy for part in parts)
    return (sum(part.rounding for part in parts) / energy) ** 0.5 if energy > 0 else 0.0


def total_error(parts: Sequence[Summary]) -> float:
    """The relative error of what is written; the truncation and the rounding are orthogonal to first order."""
    return math.hypot(relative_error(parts), rounding_error(parts))
