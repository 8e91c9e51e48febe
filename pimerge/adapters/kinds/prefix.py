"""Prefix tuning: trained keys and values before the text's, in every layer (arXiv 2101.00190).

Layout: (virtual tokens × layers · 2 · width), layer by layer its keys and its values. A layer is a range of columns and
has one weight when experts are combined, as in π-Tuning. Every prefix changes the output, so there is no neutral point
and only strength 1."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pimerge.adapters.kind import AdapterHeader, Kind, Parts
from pimerge.adapters.kinds._prompts import (
    KEY,
    fresh_fields,
    key_of_parameter,
    parse_prompt,
    reads_an_end,
    takes_text,
    text_field,
)
from pimerge.adapters.tensor_sets import TensorSet, TensorSlot

if TYPE_CHECKING:
    from torch import nn


def parse(header: AdapterHeader) -> Parts:
    """Read the layout of an expert of prefix tuning; see :mod:`pimerge.adapters.kind`.

    >>> sets, _ = parse(AdapterHeader(
    ...     {"num_virtual_tokens": 3, "token_dim": 8, "num_layers": 2}, {"prompt_embeddings": (3, 32)}))
    >>> {name: each.slots["prefix"].columns for name, each in sets.items()}
    {'layers.0': (0, 16), 'layers.1': (16, 32)}
    """
    config = header.config
    expected = {"tokens": "num_virtual_tokens", "keys and values": "num_layers 2 token_dim"}
    (tokens, width), head = parse_prompt(config, header.shapes, "prefix", expected)
    step = width // config["num_layers"]
    columns = [(layer * step, (layer + 1) * step) for layer in range(config["num_layers"])]
    slots = {f"layers.{layer}": TensorSlot(KEY, (tokens, step), columns=part) for layer, part in enumerate(columns)}
    return {name: TensorSet(name, {"prefix": slot}) for name, slot in slots.items()}, head


def misfit(group: TensorSet, model: nn.Module, config: Mapping[str, Any]) -> str:
    """Why the prefix does not fit a base; empty if it fits."""
    if not takes_text(model) or not _takes_past(model):
        return f"a prefix is put before a text's keys and values, but {type(model).__name__} does not accept any"
    if reads_an_end(model):
        return (
            f"a prefix cannot be put before texts that {type(model).__name__} classifies: PEFT gives its encoder none"
        )
    layers = text_field(model, "num_hidden_layers")
    if layers != config["num_layers"]:
        return f"it has {config['num_layers']} layers, but the base has {layers}"
    width, own = _width(model), config["token_dim"]
    return "" if width == own else f"its keys have width {own}, but the base's have {width}"


def usual_places(model: nn.Module) -> dict[str, Any]:
    """The width of the keys, in models where PEFT cannot infer it, such as T5 with 11 B parameters.

    PEFT assumes the hidden size for the width of the keys; without grouped queries, the config can state another.
    """
    is_stated = text_field(model, "num_key_value_heads") is None and text_field(model, "d_kv", "head_dim") is not None
    return {"token_dim": _width(model)} if is_stated else {}


def _width(model: nn.Module) -> int:
    """Width of all keys of a token."""
    heads = text_field(model, "num_attention_heads")
    size = text_field(model, "head_dim", "d_kv") or text_field(model, "hidden_size", "d_model") // heads
    return int((text_field(model, "num_key_value_heads") or heads) * size)


def _takes_past(model: nn.Module) -> bool:
    """Whether the model or its backbone accepts past keys and values."""
    return any(
        "past_key_values" in inspect.signature(module.forward).parameters for module in (model, *model.children())
    )


KIND = Kind(
    name="prefix",
    summary="Trained keys and values before the text's, in every layer.",
    formula="attention(q, [P_k; K], [P_v; V])",
    paper="Prefix tuning (arXiv 2101.00190)",
    peft_type="PREFIX_TUNING",
    init_slots=("prefix",),
    before_text=True,
    why_not_into="its keys and values stand before those of the text, and no weight of the base holds them",
    fresh_fields=fresh_fields,
    usual_places=usual_places,
    misfit=misfit,
    parse=parse,
    key_of_parameter=key_of_parameter,
)
