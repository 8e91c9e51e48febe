"""The merge of one module: its factors, and the loss from truncation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pimerge.adapters.lora_module import Factors, LoraModule

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Summary:
    """How the merge of one module went; see :class:`MergedModule`."""

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
        module: its layout, taken from an expert that has it.
        factors: A (r × d_in), B (d_out × r), with scaling 1.
        energy: ‖ΔW‖² before the truncation; 0 where nothing had to be computed for it.
        lost: the part of it that the truncation dropped.
        coefficients: what each update was multiplied by, for a linear method; None for another.
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
