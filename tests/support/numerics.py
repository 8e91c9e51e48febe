"""Numbers: seeded tensors, distances, and settings of hypothesis."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn


def change_basis(tensors: dict[str, Tensor], basis: Tensor) -> None:
    """(B, A) → (BR, R⁻¹A): the same ΔW from other factors."""
    for key in [key for key in tensors if "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        tensors[key], tensors[other] = torch.linalg.solve(basis, tensors[key]), tensors[other] @ basis


def relative_difference(found: Tensor, reference: Tensor) -> float:
    """‖found − reference‖ / ‖reference‖, in float64; the numerator alone if the reference is zero."""
    difference = float((found.double() - reference.double()).norm())
    return difference / (float(reference.double().norm()) or 1.0)


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        output: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return output


small = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""Of hypothesis tests: the same examples in every run."""


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers by a seed."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
