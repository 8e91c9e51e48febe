"""Prompt tuning: vectors in front of the embedded text (arXiv 2104.08691).

Layout: (virtual tokens × width), for an encoder and a decoder twice as many. No vector changes nothing, so there is no
neutral point, and one strength.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pimerge.adapters.kinds._prompts import (
    KEY,
    fresh_fields,
    key_of_parameter,
    parse_prompt,
    reads_an_end,
    takes_text,
    text_field,
)
from pimerge.adapters.kinds._tensor_sets import TensorSet, TensorSlot

if TYPE_CHECKING:
    from torch import nn

__all__ = ["INIT", "PEFT_TYPE", "fresh_fields", "key_of_parameter", "misfit", "parse"]

PEFT_TYPE = "PROMPT_TUNING"
INIT = ("prompt",)


def parse(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, convert: bool = False
) -> tuple[dict[str, TensorSet], dict[str, str]]:
    """Read the layout of an expert of prompt tuning; see :mod:`pimerge.adapters.kinds`.

    >>> groups, _ = parse({"num_virtual_tokens": 3, "token_dim": 8, "num_layers": 2}, {"prompt_embeddings": (3, 8)})
    >>> list(groups)
    ['prompt']
    """
    expected = {"tokens": "num_virtual_tokens num_transformer_submodules", "width": "token_dim"}
    shape, head = parse_prompt(config, shapes, "prompt", expected)
    return {"prompt": TensorSet("prompt", {"prompt": TensorSlot(KEY, shape)})}, head


def misfit(group: TensorSet, model: nn.Module, config: Mapping[str, Any]) -> str:
    """Why the prompt has no place in a base; empty if it has."""
    if not takes_text(model):
        return f"a prompt goes before a text, and {type(model).__name__} reads none"
    if reads_an_end(model):
        return f"a prompt cannot go before a text that {type(model).__name__} classifies: it takes no vectors"
    width = text_field(model, "embedding_size", "hidden_size", "d_model")
    own = group.slots["prompt"].shape[1]
    return "" if width == own else f"its vectors have {own} numbers, the base's embeddings {width}"
