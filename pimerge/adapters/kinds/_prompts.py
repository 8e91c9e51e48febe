"""Shared by prompt tuning and prefix tuning: one tensor ``prompt_embeddings``, put before a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pimerge.adapters.keys import PROMPT_PREFIX, sort_keys
from pimerge.adapters.kinds._config_fields import CommonFields, faulty_fields
from pimerge.core.errors import PimergeError, Problems

if TYPE_CHECKING:
    from torch import nn

KEY = "prompt_embeddings"
_USUAL_VECTORS = 16


class _PromptFields(CommonFields):
    num_virtual_tokens: int
    token_dim: int
    num_layers: int
    num_transformer_submodules: int | None = None
    prefix_projection: bool = False


def parse_prompt(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], what: str, expected: Mapping[str, str]
) -> tuple[tuple[int, ...], dict[str, str]]:
    """Read the shape of ``prompt_embeddings`` and the head.

    Args:
        expected: name of each dimension → fields of the config whose product is its size.
    """
    problems = Problems()
    faulty = faulty_fields(_PromptFields, config, problems)
    _, head = sort_keys(
        {"modules_to_save": None if "modules_to_save" in faulty else config.get("modules_to_save")},
        shapes,
        lambda key: ("", KEY) if key == KEY else None,
        what,
        problems,
        PROMPT_PREFIX,
    )
    problems.raise_any(f"this {what} cannot be used")
    shape = shapes[KEY]
    sizes = [_product(config, fields.split()) for fields in expected.values()]
    if list(shape) != sizes:
        stated = " × ".join(
            f"{size} {name} ({fields})" for (name, fields), size in zip(expected.items(), sizes, strict=True)
        )
        problems.add(f"{KEY} is {shape}, adapter_config.json says {stated}", "save config and tensors together")
    problems.raise_any(f"this {what} cannot be used")
    return shape, head


def fresh_fields(size: int | None, modules: Sequence[str] | None) -> dict[str, Any]:
    """Fields of PEFT's config for a fresh expert: the number of vectors, 16 by default.

    >>> fresh_fields(4, None)
    {'num_virtual_tokens': 4}
    """
    if modules:
        raise PimergeError(
            f"--modules is {','.join(modules)}, but a prompt or prefix is put before the text, not into modules",
            "leave it out",
        )
    return {"num_virtual_tokens": size or _USUAL_VECTORS}


def key_of_parameter(name: str) -> str:
    """The adapter file's key of a parameter of PEFT's model with adapter ``default``.

    >>> key_of_parameter("prompt_encoder.default.embedding.weight")
    'prompt_embeddings'
    """
    return KEY if name == "prompt_encoder.default.embedding.weight" else name


def takes_text(model: nn.Module) -> bool:
    """Whether a base reads tokens."""
    return getattr(_text_config(model), "vocab_size", None) is not None


def reads_an_end(model: Any) -> bool:
    """Whether a base is an encoder-decoder that classifies by the last token of a text.

    transformers does not accept vectors before the text of such a base.
    """
    return bool(model.config.is_encoder_decoder) and not model.can_generate()


def text_field(model: nn.Module, *names: str) -> Any:
    """The value of the first field that is set in a base's text config; None if no field is set."""
    config = _text_config(model)
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def _product(config: Mapping[str, Any], fields: list[str]) -> int:
    return math.prod(int(field) if field.isdigit() else config.get(field) or 1 for field in fields)
