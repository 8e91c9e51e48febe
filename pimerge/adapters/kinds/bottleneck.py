"""Bottleneck adapters behind layers, y + s · U f(D y) (arXiv 1902.00751), added to PEFT by :mod:`pimerge.peft_methods`.

Layout: D is (d × width), U is (width × d), each with a bias. The adapter changes nothing if U and its bias are 0; D and
U of one module share one weight when experts are combined, as in π-Tuning."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pimerge.adapters.kind import AdapterHeader, Kind, Parts
from pimerge.adapters.kinds._config_fields import CommonFields
from pimerge.adapters.kinds._tensor_sets import fresh_fields as placed
from pimerge.adapters.kinds._tensor_sets import parse_tensor_sets
from pimerge.adapters.tensor_sets import TensorSet, TensorSlot
from pimerge.core.errors import Problems

if TYPE_CHECKING:
    from torch import nn

_KEY = re.compile(r"(?P<module>.+)\.bottleneck_(?P<slot>(?:down|up)\.(?:weight|bias))")
_SLOTS = frozenset({"down.weight", "down.bias", "up.weight", "up.bias"})


class _BottleneckFields(CommonFields):
    bottleneck_dim: int = 64
    activation: str = "relu"
    scale: float = 1.0


def parse(header: AdapterHeader) -> Parts:
    """Read the layout of an expert of bottleneck adapters; see :mod:`pimerge.adapters.kind`.

    >>> shapes = {"down.weight": (2, 8), "down.bias": (2,), "up.weight": (8, 2), "up.bias": (8,)}
    >>> shapes = {f"base_model.model.o.bottleneck_{name}": shape for name, shape in shapes.items()}
    >>> sets, _ = parse(AdapterHeader({"bottleneck_dim": 2}, shapes))
    >>> sets["o"].slots["up.weight"].neutral, sets["o"].slots["down.weight"].neutral
    (0.0, None)
    """

    def slot(module: str, name: str, key: str, shape: tuple[int, ...]) -> TensorSlot | str:
        d, dimensions = header.config.get("bottleneck_dim", 64), 2 if name.endswith("weight") else 1
        side = {"down.weight": 0, "down.bias": 0, "up.weight": 1}.get(name)
        if len(shape) != dimensions or (side is not None and shape[side] != d):
            return f"adapter_config.json says bottleneck_dim {d}"
        return TensorSlot(key, shape, neutral=0.0 if name.startswith("up") else None)

    sets, head = parse_tensor_sets(header, _KEY, "bottleneck adapters", slot, _SLOTS, fields=_BottleneckFields)
    problems = Problems()
    for group in sets.values():
        widths = {group.slots["down.weight"].shape[1], group.slots["up.weight"].shape[0], *group.slots["up.bias"].shape}
        if len(widths) > 1:
            problems.add(f"module '{group.name}': its projections have the widths {sorted(widths)}", "save it again")
    problems.raise_any("these bottleneck adapters cannot be used")
    return sets, head


def fresh_fields(size: int | None, modules: Sequence[str] | None) -> dict[str, Any]:
    """Fields of PEFT's config for a fresh expert; d is 64 by default.

    >>> fresh_fields(8, None)
    {'bottleneck_dim': 8}
    """
    return {"bottleneck_dim": size or _BottleneckFields.model_fields["bottleneck_dim"].default, **placed(None, modules)}


def usual_places(model: nn.Module) -> dict[str, Any]:
    """Target modules in an architecture that is not in :data:`~pimerge.peft_methods.bottleneck.TARGETS`.

    They are all modules with a name that an output projection has in some known architecture.
    """
    from pimerge.checkpoints.architecture import named_layers  # imports torch
    from pimerge.peft_methods.bottleneck import TARGETS

    if str(model.config.model_type) in TARGETS:  # type: ignore[union-attr]
        return {}
    return {"target_modules": named_layers(model, sorted({end for ends in TARGETS.values() for end in ends}))}


def misfit(group: TensorSet, model: nn.Module, config: Mapping[str, Any]) -> str:
    """Why a tensor set does not fit a base; empty if it fits."""
    from pimerge.peft_methods.bottleneck import output_width

    width, own = output_width(model.get_submodule(group.name), model), group.slots["up.weight"].shape[0]
    return "" if width == own else f"it adapts outputs of width {own}, but the base's have {width}"


KIND = Kind(
    name="bottleneck",
    summary="Bottleneck adapters behind layers.",
    formula="y + s · U f(D y)",
    paper="Adapters (arXiv 1902.00751)",
    peft_type="BOTTLENECK",
    slots=("bottleneck_",),
    init_slots=("down.weight",),
    meaning_fields=("activation", "scale"),
    needs_import=True,
    why_not_into="it adds layers with a nonlinearity, which no weight of the base can hold",
    fresh_fields=fresh_fields,
    usual_places=usual_places,
    misfit=misfit,
    parse=parse,
)
