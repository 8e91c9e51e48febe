"""The names of a base's modules in the model classes of transformers that load it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pimerge.checkpoints.base_modules import BaseModules, ClassNames
from pimerge.checkpoints.key_mapping import UNBUILDABLE, model_of
from pimerge.checkpoints.renaming import renaming_of, transforms_of, undoing_of
from pimerge.core.errors import PimergeError


def modules_of_config(folder: Path, config: Mapping[str, Any]) -> BaseModules | None:
    """The names of the modules of the model that a config describes; None if transformers does not know it.

    Args:
        folder: the base's folder.
    """
    try:
        model = model_of(folder, config)
    except PimergeError:  # whoever loads the base is told
        return None
    return None if model is None else modules_of_model(model)


def modules_of_model(model: Any) -> BaseModules:
    """The names of the modules of a model of transformers, which needs no weights."""
    transforms = transforms_of(model)
    rename, undo = renaming_of(model, transforms), undoing_of(transforms)

    def today(name: str) -> str:
        key, changed = rename(f"{name}.weight")
        return name if changed else key.removesuffix(".weight")

    @cache
    def other_classes() -> ClassNames:
        return _names_in_classes(model.config)

    return BaseModules(_names(model), str(model.base_model_prefix), today, undo, other_classes)


def _names(model: Any) -> frozenset[str]:
    return frozenset(name for name, _ in model.named_modules())


def _names_in_classes(config: Any) -> ClassNames:
    """The names of modules in every class that loads a base or a part of it, such as its language model."""
    headed: set[str] = set()
    plain: set[str] = set()
    for kind, own in _classes(config):
        try:
            with torch.device("meta"):
                model = kind(copy.deepcopy(own))
        except UNBUILDABLE:  # a class that needs options or libraries that the others do not
            continue
        has_backbone = hasattr(model, str(model.base_model_prefix) or "base_model")
        (headed if has_backbone else plain).update(_names(model))
    return ClassNames(frozenset(headed), frozenset(plain))


def _classes(config: Any) -> Iterator[tuple[Any, Any]]:
    """Each class of transformers' Auto classes for a config or for one in it, and that config."""
    import transformers
    from transformers.models.auto import modeling_auto

    mappings = [value for name, value in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    for own in (config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)):
        found = [mapping.get(getattr(own, "model_type", None), ()) for mapping in mappings]
        names = [name for entry in found for name in ((entry,) if isinstance(entry, str) else entry)]
        yield from ((kind, own) for name in dict.fromkeys(names) if (kind := getattr(transformers, name, None)))
