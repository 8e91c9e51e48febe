"""Let PEFT open an adapter against a skeleton of its base, without a weight of the base.

The skeleton is on the meta device, so this takes the memory of the adapter alone for any size of base.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.keys import OF_TOKENS
from pimerge.adapters.model_class import loading_classes
from pimerge.adapters.output_check import BUG
from pimerge.checkpoints.base import Base
from pimerge.core.errors import PimergeError
from pimerge.core.hf_loading import load_adapter, load_config, model_of_config

_LOADS_APART = ("prompt_embeddings", "prompt_encoder", "vblora_vector_bank", "unilora_theta_d")
"""Tensors that PEFT does not load by the model's own names."""


def check_with_peft(folder: Path, base: Base) -> None:
    """Check that PEFT loads every tensor of an adapter and misses none.

    Nothing is checked if the base's config is not on this machine, or if transformers has no model with these modules.
    """
    expert = open_expert(folder, base.reference if base.folder is not None else None, convert=True)
    faults = []
    for model in _skeletons(expert, base):
        if not _holds(model, expert):
            continue
        fault = _fault(model, folder)
        if not fault:
            return
        faults.append(f"{type(model).__name__}: {fault}")
    if faults:
        raise PimergeError(f"the result was not written, since PEFT does not load it into {faults[0]}", BUG)


def _skeletons(expert: Expert, base: Base) -> Iterator[Any]:
    """Models of the base without weights, of the classes that the adapter can be trained in."""
    import torch
    import transformers

    if base.folder is None:
        return
    try:
        config = load_config(base.folder)
    except (PimergeError, OSError, ValueError, KeyError):
        return
    if tokens := _tokens(expert):
        config.get_text_config().vocab_size = tokens
    labels = min((expert.file.entries[key].shape[0] for key in _rows(expert)), default=0)
    if labels:
        config.num_labels = labels
    for name in dict.fromkeys([*loading_classes(expert.config), *(config.architectures or ()), "AutoModel"]):
        kind = getattr(transformers, name, None)
        try:
            with torch.device("meta"):
                own = copy.deepcopy(config)
                model = model_of_config(kind, own) if name.startswith("Auto") else kind(own)  # type: ignore[misc]
        except (AttributeError, TypeError, ValueError, KeyError, ImportError, OSError, RuntimeError):
            continue  # another class than this architecture's, or one that needs weights
        yield model


def _rows(expert: Expert) -> list[str]:
    """The keys of a classifier's tensors, which have one row for each label."""
    ends = (".classifier", ".score", ".out_proj")
    return [key for name, key in expert.head.items() if f".{name}".rpartition(".")[0].endswith(ends)]


def _tokens(expert: Expert) -> int:
    """The number of tokens of the embeddings that an adapter holds or updates; 0 if it has none."""
    saved = {name.removesuffix(".weight"): expert.file.entries[key].shape[0] for name, key in expert.head.items()}
    updated = {
        name: module.d_in if module.layer == "embedding" else module.d_out for name, module in expert.modules.items()
    }
    return next((rows for name, rows in (updated | saved).items() if name.rpartition(".")[2] in OF_TOKENS), 0)


def _holds(model: Any, expert: Expert) -> bool:
    """Whether a model has any of the adapted modules, also by an older name."""
    if expert.strategy.before_text:
        return True
    names = {name for name, _ in model.named_modules()}
    bare = {module.parameter.module for module in expert.modules.values() if module.parameter}
    return any(part in names for part in (*expert.parts, *bare))


def _fault(model: Any, folder: Path) -> str:
    """Why PEFT does not load an adapter; empty if it does."""
    import torch

    from pimerge import peft_methods  # noqa: F401  PEFT has to know every kind

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            adapted = load_adapter(model, folder, torch_device="cpu", low_cpu_mem_usage=True)
            found = adapted.load_adapter(str(folder), "default", torch_device="cpu", low_cpu_mem_usage=True)
        except NotImplementedError:  # a layer that cannot be made without the base's weights
            return ""
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    missing = [key for key in found.missing_keys if not any(part in key for part in _LOADS_APART)]
    unused = [key for key in found.unexpected_keys if not any(part in key for part in _LOADS_APART)]
    return "; ".join([*(f"it lacks {key}" for key in missing[:3]), *(f"it does not use {key}" for key in unused[:3])])
