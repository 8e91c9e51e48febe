"""Prompt tuning: vectors in front of the embedded text (arXiv 2104.08691).

Layout: (virtual tokens × width), with twice as many tokens for an encoder-decoder. Every prompt changes the output, so
there is no neutral point and only strength 1.
"""

from __future__ import annotations

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
    """Read the layout of an expert of prompt tuning; see :mod:`pimerge.adapters.kind`.

    >>> sets, _ = parse(AdapterHeader(
    ...     {"num_virtual_tokens": 3, "token_dim": 8, "num_layers": 2}, {"prompt_embeddings": (3, 8)}))
    >>> list(sets)
    ['prompt']
    """
    expected = {"tokens": "num_virtual_tokens num_transformer_submodules", "width": "token_dim"}
    shape, head = parse_prompt(header.config, header.shapes, "prompt", expected)
    return {"prompt": TensorSet("prompt", {"prompt": TensorSlot(KEY, shape)})}, head


def misfit(group: TensorSet, model: nn.Module, config: Mapping[str, Any]) -> str:
    """Why the prompt does not fit a base; empty if it fits."""
    if not takes_text(model):
        return f"a prompt is put before a text, but {type(model).__name__} does not read text"
    if reads_an_end(model):
        return (
            f"a prompt cannot be put before a text that {type(model).__name__} classifies: it does not accept vectors"
        )
    width = text_field(model, "embedding_size", "hidden_size", "d_model")
    own = group.slots["prompt"].shape[1]
    return "" if width == own else f"its vectors have width {own}, but the base's embeddings have {width}"


KIND = Kind(
    name="prompt",
    summary="Vectors in front of the embedded text.",
    formula="model([P; E(text)])",
    paper="Prompt tuning (arXiv 2104.08691)",
    peft_type="PROMPT_TUNING",
    init_slots=("prompt",),
    meaning_fields=("num_transformer_submodules",),
    before_text=True,
    embeds_tokens=True,
    why_not_into="its vectors stand in front of the embedded text, and no weight of the base holds them",
    fresh_fields=fresh_fields,
    misfit=misfit,
    parse=parse,
    key_of_parameter=key_of_parameter,
)
