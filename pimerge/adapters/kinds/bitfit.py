"""BitFit: trained biases replace the base's (arXiv 2106.10199); :mod:`pimerge.peft_methods` adds it to PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pimerge.adapters.kind import AdapterHeader, Kind, Parts
from pimerge.adapters.kinds._tensor_sets import fresh_fields, parse_tensor_sets
from pimerge.adapters.tensor_sets import BaseChange, TensorSet, TensorSlot, replacements

if TYPE_CHECKING:
    from torch import nn


_KEY = re.compile(r"(?P<module>.+)\.(?P<slot>bitfit_bias)")


def parse(header: AdapterHeader) -> Parts:
    """Read the layout of an expert of biases; see :mod:`pimerge.adapters.kind`.

    >>> sets, _ = parse(AdapterHeader({}, {"base_model.model.q.bitfit_bias": (4,)}))
    >>> sets["q"].slots["bitfit_bias"].base
    'q.bias'
    """

    def slot(module: str, name: str, key: str, shape: tuple[int, ...]) -> TensorSlot | str:
        return TensorSlot(key, shape, base=f"{module}.bias") if len(shape) == 1 else "expected one dimension"

    return parse_tensor_sets(header, _KEY, "biases", slot, frozenset({"bitfit_bias"}))


def base_changes(group: TensorSet, config: Mapping[str, Any]) -> list[BaseChange]:
    """The parameters that the trained ones replace."""
    return replacements(group)


def misfit(group: TensorSet, model: nn.Module, config: Mapping[str, Any]) -> str:
    """Why a tensor set does not fit a base; empty if it fits."""
    bias = getattr(model.get_submodule(group.name), "bias", None)
    if bias is None:
        return "the base's layer has no bias"
    found = group.slots["bitfit_bias"].shape
    return "" if tuple(bias.shape) == found else f"its bias is {found}, the base's {tuple(bias.shape)}"


KIND = Kind(
    name="bitfit",
    summary="Trained biases in place of the base's.",
    formula="y = W x + b'",
    paper="BitFit (arXiv 2106.10199)",
    peft_type="BITFIT",
    slots=("bitfit_",),
    needs_import=True,
    fresh_fields=fresh_fields,
    base_changes=base_changes,
    misfit=misfit,
    parse=parse,
)
