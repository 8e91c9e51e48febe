"""The backbone of a transformers model, and the layers in it that adapters modify."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

QUERIES_AND_VALUES = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "qkv", "c_attn")
"""Name endings of query and value projections, for architectures for which PEFT has no default."""


HEADS = frozenset("classifier score qa_outputs lm_head embed_out classification_head pre_classifier pooler cls".split())  # noqa: SIM905
"""Names of modules on top of the backbone, in most architectures."""


def is_of_head(module: str) -> bool:
    """Whether a module is on top of the backbone by its name.

    >>> is_of_head("classifier.dense"), is_of_head("bert.encoder.layer.0.output.dense")
    (True, False)
    """
    return module.partition(".")[0] in HEADS


def heads_of(model: nn.Module) -> list[str]:
    """The names of the modules on top of the backbone: a task's head or the language model's head.

    The backbone is the child named ``base_model_prefix``. Without one, as in CLIP's classifier and in T5, it is every
    child that holds a list of layers or an embedding.

    >>> vision = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
    >>> heads_of(nn.ModuleDict({"vision_model": vision, "classifier": nn.Linear(4, 2)}))
    ['classifier']
    """
    named = str(getattr(model, "base_model_prefix", ""))
    children = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    if named in children:
        return [name for name in children if name != named]
    return [
        name
        for name, child in children.items()
        if not any(isinstance(module, nn.ModuleList | nn.Embedding) for module in child.modules())
    ]


def hidden_size(model: nn.Module) -> int | None:
    """Hidden size of a model, for a multimodal model of its text part; None if the config does not state it.

    >>> from transformers import T5Config, T5ForConditionalGeneration
    >>> hidden_size(T5ForConditionalGeneration(T5Config(d_model=8, num_layers=1, vocab_size=4)))
    8
    """
    config: Any = model.config
    text = config.get_text_config()
    width = getattr(text, "hidden_size", None) or getattr(text, "d_model", None)
    return width if isinstance(width, int) else None


def inside(modules: Sequence[str]) -> str | None:
    """A regular expression for PEFT that matches these modules and everything in them; None for no modules.

    >>> inside(["classifier", "pooler"])
    '(classifier|pooler)(\\\\..*)?'
    """
    return f"({'|'.join(map(re.escape, modules))})(\\..*)?" if modules else None


def layers_within(model: nn.Module) -> dict[str, nn.Module]:
    """Full name → module, for the modules of the backbone."""
    heads = tuple(f"{name}." for name in heads_of(model))
    return {name: module for name, module in model.named_modules() if not f"{name}.".startswith(heads)}


def named_layers(model: nn.Module, ends: Sequence[str]) -> list[str]:
    """The modules of the backbone whose names have one of these endings.

    >>> block = nn.ModuleDict({"q_proj": nn.Linear(1, 1)})
    >>> named_layers(nn.ModuleDict({"layers": nn.ModuleList([block])}), ["q_proj", "v_proj"])
    ['layers.0.q_proj']
    """
    dotted = tuple(f".{end}" for end in ends)
    return [name for name in layers_within(model) if f".{name}".endswith(dotted)]


def norms(model: nn.Module) -> list[str]:
    """The normalisation layers of the backbone that have weights."""
    return [
        name
        for name, module in layers_within(model).items()
        if type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and getattr(module, "weight", None) is not None
    ]


def lora_targets(model: nn.Module) -> list[str]:
    """The modules that PEFT adapts by LoRA in this architecture; for an unknown one, queries and values."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    ends = TARGETS.get(str(model.config.model_type), QUERIES_AND_VALUES)  # type: ignore[union-attr]
    if isinstance(ends, str):
        return [name for name in layers_within(model) if re.fullmatch(ends, name)]
    return named_layers(model, ends)
