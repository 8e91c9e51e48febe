"""The merged update of a module, and the error of its truncation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pimerge.adapters.lora_module import Factors, LoraModule


@dataclass(frozen=True)
class Summary:
    """Rank and truncation error of one merged module; see :class:`MergedModule`."""

    name: str
    rank: int
    energy: float
    lost: float
    coefficients: tuple[float, ...] | None

    @property
    def error(self) -> float:
        """‖ΔW − ΔW_r‖ / ‖ΔW‖, in [0, 1]."""
        return relative_error([self])


@dataclass(frozen=True)
class MergedModule:
    """One module's merged update.

    Attributes:
        module: its layout, taken from an expert that has the module.
        factors: A (r × d_in), B (d_out × r), with scaling 1.
        energy: ‖ΔW‖² before the truncation; 0 if nothing was truncated.
        lost: the part of the energy that the truncation dropped.
        coefficients: factor of each expert's update, for a linear method; None for any other.
    """

    module: LoraModule
    factors: Factors
    energy: float = 0.0
    lost: float = 0.0
    coefficients: tuple[float, ...] | None = None

    @property
    def summary(self) -> Summary:
        """Everything but the tensors."""
        return Summary(self.module.name, len(self.factors.A), self.energy, self.lost, self.coefficients)


def relative_error(parts: Sequence[Summary]) -> float:
    """The relative truncation error over some modules: √(Σ lost / Σ energy), ‖ΔW − ΔW_r‖ / ‖ΔW‖."""
    energy = sum(part.energy for part in parts)
    return (sum(part.lost for part in parts) / energy) ** 0.5 if energy > 0 else 0.0
