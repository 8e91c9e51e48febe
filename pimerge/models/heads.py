"""Resize, set and initialise the head of a base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pimerge.adapters.base_fit import skeleton
from pimerge.checkpoints.base import Base
from pimerge.core.errors import Problems
from pimerge.models.injection import peft_prefix
from pimerge.models.loaded_base import LoadedBase
from pimerge.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def head_of_size(loaded: LoadedBase, base: Base, task: Task, labels: int) -> Iterator[None]:
    """Replace the base's head by zeros for a number of labels during the block.

    Args:
        task: a task of the type for which the base was loaded.
    """
    bare = skeleton(base.source, base.revision, task.type, labels)
    parameter = next(loaded.model.parameters())
    before = {name: loaded.model.get_submodule(name) for name in loaded.head}
    try:
        for name in loaded.head:
            empty = deepcopy(bare.get_submodule(name)).to_empty(device=parameter.device).to(parameter.dtype)
            empty.requires_grad_(False)
            for tensor in (*empty.parameters(), *empty.buffers()):
                tensor.zero_()
            loaded.model.set_submodule(name, empty.eval())
        yield
    finally:
        for name, module in before.items():
            loaded.model.set_submodule(name, module)


def set_head(model: nn.Module, head: Mapping[str, Tensor]) -> None:
    """Copy a head into a PEFT model or a plain model."""
    places = {}
    prefix = peft_prefix(model)
    for name, parameter in model.named_parameters():
        plain = name.removeprefix(prefix)
        if ".original_module." not in name:
            places[plain.replace(".modules_to_save.default.", ".")] = parameter
    problems = Problems()
    for name, value in head.items():
        if name not in places:
            problems.add(f"the base model has no '{name}' for the head")
        elif places[name].shape != value.shape:
            problems.add(f"the head's '{name}' is {tuple(value.shape)}, the model's {tuple(places[name].shape)}")
    problems.raise_any("the head does not fit the model")
    with torch.no_grad():
        for name, value in head.items():
            places[name].copy_(value)


def initialise_head(loaded: LoadedBase, seed: int) -> None:
    """Reinitialise the head's parameters that the checkpoint lacks, as :func:`load_base` does with this seed."""
    model: Any = loaded.model
    for key in loaded.randomly_initialised:
        marked = [model.get_parameter_or_buffer(key)]
        while key:
            key = key.rpartition(".")[0]
            marked.append(model.get_submodule(key))  # some models initialise their head in its parent module
        for each in marked:
            vars(each).pop("_is_hf_initialized", None)  # transformers initialises modules without this mark
    torch.manual_seed(seed)
    model.initialize_weights()
