"""Strengths at which each expert is tried.

At strength s the model is W0 + s · ΔW, or neutral + s · (φ − neutral) for an expert without ΔW. An expert without a
neutral point is tried only at full strength.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pimerge.adapters.expert import Expert
from pimerge.models.injection import injected_sum
from pimerge.models.loaded_base import LoadedBase

if TYPE_CHECKING:
    from torch import nn

STRENGTHS = (0.25, 0.5, 0.75, 1.0)


def strengths_of(expert: Expert) -> tuple[float, ...]:
    """Return the strengths at which an expert is tried."""
    return STRENGTHS if expert.has_strength else (1.0,)


def models_at_strengths(expert: Expert, loaded: LoadedBase) -> Iterator[tuple[float, nn.Module]]:
    """Yield each strength with PEFT's model of the base and the expert at that strength."""
    if expert.tensor_sets:
        for strength in strengths_of(expert):
            with injected_sum([expert.with_strength(strength)], [1.0], loaded) as model:
                yield strength, model
        return
    with injected_sum([expert], [1.0], loaded) as model:
        for strength in _strengths(model):
            yield strength, model


def _strengths(model: nn.Module) -> Iterator[float]:
    """Set PEFT's model to W0 + strength · ΔW for each of :data:`STRENGTHS`; the last strength is 1."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    full = [dict(layer.scaling) for layer in layers]
    for strength in STRENGTHS:
        for layer, scaling in zip(layers, full, strict=True):
            layer.scaling.update({name: strength * value for name, value in scaling.items()})
        yield strength
