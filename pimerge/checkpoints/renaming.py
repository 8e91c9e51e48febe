"""What transformers renames when it loads a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any


def transforms_of(model: Any) -> list[Any]:
    """Every change that transformers makes to the keys or tensors of a model's files."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))


def renaming_of(model: Any, transforms: Sequence[Any]) -> Callable[[str], tuple[str, tuple[str, ...]]]:
    """Key on disk → parameter name, and the operations by which transformers changes the values when it loads them."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()

    operations = {
        pattern: tuple(type(operation).__name__ for operation in converter.operations) or ("none",)
        for converter in converters
        for pattern in converter.source_patterns
    }

    def rename(key: str) -> tuple[str, tuple[str, ...]]:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        return name, () if pattern is None else operations[pattern]

    return rename


def undoing_of(transforms: Sequence[Any]) -> Callable[[str], str]:
    """Name of a module today → its name in the files of earlier versions."""
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    undone = []
    for transform in reversed(transforms):
        if isinstance(transform, WeightRenaming):
            with suppress(ValueError, IndexError, re.error):  # not every renaming can be undone
                undone.append(transform.reverse_transform())

    def undo(name: str) -> str:
        with suppress(ValueError, IndexError, re.error):
            return str(rename_source_key(f"{name}.weight", undone, [], reverse=True)[0]).removesuffix(".weight")
        return name

    return undo
