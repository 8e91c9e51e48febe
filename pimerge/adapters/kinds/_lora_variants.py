"""Find how a variant of LoRA stores the factors of a module: QA-LoRA, BD-LoRA and KaSA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pimerge.adapters.lora_module import KASA, LoraModule
from pimerge.adapters.variant_module import VariantModule
from pimerge.core.errors import Problems

QALORA_GROUP = 16
"""The value of ``qalora_group_size`` in PEFT's config if it is not given."""


def blocks_of(config: Mapping[str, Any], module: str, letter: str) -> int:
    """The number of blocks in which BD-LoRA stores a module's factor; 1 for a usual matrix.

    >>> blocks_of({"use_bdlora": {"target_modules_bd_a": ["o_proj"], "nblocks": 2}}, "layers.0.o_proj", "a")
    2
    """
    fields = config.get("use_bdlora")
    if not isinstance(fields, Mapping):
        return 1
    patterns = fields.get(f"target_modules_bd_{letter}") or []
    return int(fields.get("nblocks") or 1) if any(pattern in module for pattern in patterns) else 1


def factor_shapes(
    name: str, keys: Mapping[str, str], config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a module's factors A and B, whatever the form in which its tensors store them.

    >>> keys = {"A": "a", "B": "b"}
    >>> factor_shapes("q", keys, {"use_qalora": True, "qalora_group_size": 4}, {"a": (2, 3), "b": (5, 2)})
    ((2, 12), (5, 2))
    """
    (rows_A, *rest_A), (rows_B, *rest_B) = (shapes[keys[letter]] or (1,) for letter in "AB")
    if rest_A:
        rest_A[0] *= _group(config) * blocks_of(config, name, "a")
    if rest_B:
        rest_B[0] *= blocks_of(config, name, "b")
    return (rows_A, *rest_A), (rows_B, *rest_B)


def _group(config: Mapping[str, Any]) -> int:
    return int(config.get("qalora_group_size") or QALORA_GROUP) if config.get("use_qalora") else 1


def as_variant(
    module: LoraModule, keys: Mapping[str, str], config: Mapping[str, Any], problems: Problems
) -> LoraModule:
    """A module whose tensors are in the form of a variant; a usual module is returned unchanged.

    Args:
        module: the module, with the shapes of its factors.
        keys: slot → key.
    """
    group = _group(config)
    blocks = {letter: blocks_of(config, module.name, letter) for letter in "ab"}
    diagonal = keys.get("diag")
    if (KASA in module.conversions) != (diagonal is not None):
        problems.add(
            f"module '{module.name}' has {'a' if diagonal else 'no'} lora_diag, but kasa_config is "
            f"{'off' if diagonal else 'on'}",
            "save config and tensors together",
        )
    if group == 1 and blocks == {"a": 1, "b": 1} and diagonal is None:
        return module
    if module.layer != "linear":
        problems.add(f"module '{module.name}': PEFT has QA-LoRA, BD-LoRA and KaSA for Linear layers only")
    fields = {each.name: getattr(module, each.name) for each in dataclasses.fields(module)}
    # the pooled inputs are multiplied by their number, d_in / group
    fields["scaling"] *= module.d_in / group / group if group > 1 else 1.0
    return VariantModule(**fields, diagonal=diagonal, group=group, blocks_A=blocks["a"], blocks_B=blocks["b"])
