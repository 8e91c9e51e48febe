"""LN tuning: trained LayerNorm weights and biases replace the base's (arXiv 2312.11420)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pimerge.adapters.kind import AdapterHeader, Kind, Parts
from pimerge.adapters.kinds._tensor_sets import fresh_fields, of_all_modules, parse_tensor_sets
from pimerge.adapters.tensor_sets import BaseChange, TensorSet, TensorSlot, replacements

if TYPE_CHECKING:
    from torch import nn


_KEY = re.compile(r"(?P<module>.+)\.ln_tuning_layers\.(?P<slot>weight|bias)")


def parse(header: AdapterHeader) -> Parts:
    """Read the layout of an expert of trained LayerNorms; see :mod:`pimerge.adapters.kind`.

    >>> sets, _ = parse(AdapterHeader({}, {"base_model.model.norm.ln_tuning_layers.weight": (4,)}))
    >>> sets["norm"].slots["weight"].base
    'norm.weight'
    """

    def slot(module: str, name: str, key: str, shape: tuple[int, ...]) -> TensorSlot | str:
        return TensorSlot(key, shape, base=f"{module}.{name}")

    return parse_tensor_sets(header, _KEY, "LayerNorms", slot, frozenset({"weight"}))


def usual_places(model: nn.Module) -> dict[str, Any]:
    """Target modules in an architecture that PEFT does not know: all normalisation layers."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING as KNOWN

    from pimerge.checkpoints.architecture import norms  # imports torch

    config: Any = model.config
    return {} if config.model_type in KNOWN else {"target_modules": norms(model)}


def base_changes(group: TensorSet, config: Mapping[str, Any]) -> list[BaseChange]:
    """The parameters that the trained ones replace."""
    return replacements(group)


def misfit(group: TensorSet, model: nn.Module, config: Mapping[str, Any]) -> str:
    """Why a tensor set does not fit a base; empty if it fits."""
    own = {name: tuple(value.shape) for name, value in model.get_submodule(group.name).named_parameters(recurse=False)}
    found = {name: slot.shape for name, slot in group.slots.items()}
    return "" if own == found else f"it holds {found}, but the base's layer holds {own}"


KIND = Kind(
    name="ln-tuning",
    summary="Trained LayerNorms in place of the base's.",
    formula="y = γ' ⊙ norm(x) + β'",
    paper="LN tuning (arXiv 2312.11420)",
    peft_type="LN_TUNING",
    slots=("ln_tuning_",),
    fresh_fields=fresh_fields,
    usual_places=usual_places,
    base_changes=base_changes,
    misfit=misfit,
    in_one_form=of_all_modules,
    parse=parse,
)
