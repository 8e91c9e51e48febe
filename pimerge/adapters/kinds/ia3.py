"""(IA)³: vectors that scale the outputs of layers, or the inputs of feed-forward layers (arXiv 2205.05638).

Layout: (d_out × 1) for a layer whose outputs are scaled, (1 × d_in) for one whose inputs are. A vector of ones
changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pimerge.adapters.kind import AdapterHeader, Kind, Parts, TensorSets
from pimerge.adapters.kinds._tensor_sets import fresh_fields as placed
from pimerge.adapters.kinds._tensor_sets import of_all_modules, parse_tensor_sets
from pimerge.adapters.tensor_sets import BaseChange, Effect, TensorSet, TensorSlot
from pimerge.core.errors import PimergeError
from pimerge.core.patterns import matches

if TYPE_CHECKING:
    from torch import nn

_KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin", "qkv")
_FEEDFORWARD = ("fc2", "lin2", "down_proj", "wo", "dense_4h_to_h", "mlp.c_proj")
_KEY = re.compile(r"(?P<module>.+)\.(?P<slot>ia3_l)")


_WHY_NO_UPDATE = "(IA)³ scales the outputs or inputs of W, so its ΔW = diag(l − 1)·W depends on the base's weights"


def parse(header: AdapterHeader) -> Parts:
    """Read the layout of an (IA)³ expert; see :mod:`pimerge.adapters.kind`.

    >>> sets, _ = parse(AdapterHeader({}, {"base_model.model.k.ia3_l": (4, 1)}))
    >>> sets["k"].slots["ia3_l"].neutral
    1.0
    """

    def slot(module: str, name: str, key: str, shape: tuple[int, ...]) -> TensorSlot | str:
        is_vector = shape.count(1) >= len(shape) - 1 > 0
        return TensorSlot(key, shape, neutral=1.0) if is_vector else "expected a row or a column"

    feedforward, targets = (header.config.get(field) for field in ("feedforward_modules", "target_modules"))
    if isinstance(feedforward, list) and isinstance(targets, list) and (stray := set(feedforward) - set(targets)):
        raise PimergeError(
            f"feedforward_modules has {', '.join(sorted(map(str, stray)))}, which target_modules lacks: PEFT saves "
            "such a config if it chose feedforward_modules itself, but does not load it",
            "in adapter_config.json, keep in feedforward_modules only modules that target_modules has",
        )
    return parse_tensor_sets(header, _KEY, "(IA)³ vectors", slot, frozenset({"ia3_l"}))


def in_one_form(experts: Sequence[TensorSets]) -> tuple[list[TensorSets], dict[str, Any]]:
    """Give every expert the modules of all, with vectors of ones; not if the shapes hide which side they scale."""
    found, fields = of_all_modules(experts)
    shapes = {name: group.slots["ia3_l"].shape for name, group in found[0].items()} if fields else {}
    if any(len(shape) != 2 or shape == (1, 1) for shape in shapes.values()):
        return list(experts), {}
    inputs = [name for name, shape in shapes.items() if shape[0] == 1]
    return found, fields | ({"feedforward_modules": inputs} if fields else {})


def fresh_fields(size: int | None, modules: Sequence[str] | None) -> dict[str, Any]:
    """Fields of PEFT's config for a fresh expert; named modules have their outputs scaled.

    >>> fresh_fields(None, ["k"])
    {'target_modules': ['k'], 'feedforward_modules': []}
    """
    return placed(size, modules) | ({"feedforward_modules": []} if modules else {})


def usual_places(model: nn.Module) -> dict[str, Any]:
    """Target modules in an architecture that PEFT does not know.

    As in the paper: keys, values, and the inputs of the last layer of each feed-forward block.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

    from pimerge.checkpoints.architecture import named_layers  # imports torch

    config: Any = model.config
    if config.model_type in KNOWN:
        return {}
    last = named_layers(model, _FEEDFORWARD)
    return {"target_modules": named_layers(model, _KEYS_AND_VALUES) + last, "feedforward_modules": last}


def base_changes(group: TensorSet, config: Mapping[str, Any]) -> list[BaseChange]:
    """The scaled weight, and the bias where outputs are scaled; the shape of a convolution's vector is always
    (1, n, …), and the config says which side it scales.

    >>> slot = TensorSlot("k.ia3_l", (4, 1), neutral=1.0)
    >>> [change.parameter for change in base_changes(TensorSet("k", {"ia3_l": slot}), {})]
    ['k.weight', 'k.bias']
    """
    slot, named = group.slots["ia3_l"], config.get("feedforward_modules") or []
    in_config = matches(named, group.name) if isinstance(named, str) else group.name.endswith((*named,))
    is_clear = len(slot.shape) == 2 and slot.shape[0] != slot.shape[1]
    if slot.shape[0] == 1 if is_clear else in_config:
        return [BaseChange(f"{group.name}.weight", slot.key, slot.shape, Effect.SCALED_INPUTS)]
    weight, bias = (
        BaseChange(f"{group.name}.{name}", slot.key, slot.shape, Effect.SCALED_OUTPUTS, is_optional=name == "bias")
        for name in ("weight", "bias")
    )
    return [weight, bias]


def misfit(group: TensorSet, model: nn.Module, config: Mapping[str, Any]) -> str:
    """Why a tensor set does not fit a base; empty if it fits."""
    weight = getattr(model.get_submodule(group.name), "weight", None)
    if weight is None or weight.dim() < 2:
        return f"the base's '{group.name}' has no matrix to scale"
    length, shape = max(group.slots["ia3_l"].shape), tuple(weight.shape)
    return "" if length in shape[:2] else f"it scales {length} numbers, but the base's weight is {shape}"


KIND = Kind(
    name="ia3",
    summary="Vectors that scale the outputs or the inputs of layers.",
    formula="y = l ⊙ W x, or W (l ⊙ x)",
    paper="(IA)³ (arXiv 2205.05638)",
    peft_type="IA3",
    slots=("ia3_",),
    why_no_update=_WHY_NO_UPDATE,
    fresh_fields=fresh_fields,
    usual_places=usual_places,
    base_changes=base_changes,
    misfit=misfit,
    in_one_form=in_one_form,
    parse=parse,
)
