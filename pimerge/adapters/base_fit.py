"""Check whether an expert fits a base: every module and shape, in a model or its skeleton."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import nn

from pimerge.adapters.expert import Expert
from pimerge.adapters.lora_module import LoraModule
from pimerge.adapters.tensor_sets import TensorSet
from pimerge.checkpoints.architecture import is_of_head
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.hf_loading import load_config, model_of_config
from pimerge.tasks.task import Task
from pimerge.tasks.task_type import TaskType

_HEAD_HINT = "pass --base with a checkpoint that has this head, or leave it out: pimerge merge EXPERT --exclude MODULE"


def check_fits(expert: Expert, base_model: nn.Module, *, head: bool = True) -> None:
    """Check every module and head tensor of an expert against a base, loaded or as a skeleton.

    Args:
        head: whether to check the head as well.
    """
    problems = Problems()
    hint = "the expert was trained on another base: pass its own with --base"
    if expert.config.get("layer_replication"):
        problems.add(
            "it adapts copies of the base's layers (layer_replication), which the base itself does not have",
            "such experts can be merged into an adapter only",
        )
    layers = dict(base_model.named_modules())
    for module in expert.modules.values():
        expected, found = _delta_shape(module, layers), (module.d_out, module.d_in)
        if expected is None:
            what = f"parameter '{module.parameter.full_name}'" if module.parameter else f"module '{module.name}'"
            is_head = is_of_head(module.name)
            problems.add(
                f"the base has no {what}{is_head * ', a head that the expert adapts'}", _HEAD_HINT if is_head else hint
            )
            continue
        if expected != found:
            problems.add(f"module '{module.name}': ΔW is {found}, but the base's weight is {expected}", hint)
    for reason in dict.fromkeys(_misfit(expert, part, base_model) for part in expert.tensor_sets.values()):
        if reason:
            problems.add(reason, hint)
    own = base_model.state_dict()
    for name, key in expert.head.items() if head else ():
        shape = tuple(expert.file.entries[key].shape)
        if name not in own:
            problems.add(f"the base has no '{name}' for the head", hint)
        elif tuple(own[name].shape) != shape:
            problems.add(
                f"the head's '{name}' is {shape}, but the task needs {tuple(own[name].shape)}",
                "task.json's labels must be those that the expert was trained on",
            )
    problems.raise_any(f"the expert '{expert.name}' does not fit the base '{expert.base.name}'")


def _delta_shape(module: LoraModule, layers: Mapping[str, nn.Module]) -> tuple[int, ...] | None:
    """(d_out, d_in) of the update that a module would have in a base; None if the base does not have it."""
    place = module.parameter
    if place is None:
        return None if module.name not in layers else delta_shape(layers[module.name])
    owner = layers.get(place.module)
    weight = getattr(owner, place.name, None)
    if not isinstance(weight, nn.Parameter) or weight.dim() not in (2, 3):
        return None
    if place.count != (len(weight) if weight.dim() == 3 else 1):
        return ()
    rows, columns = weight.shape[-2:]
    return (columns, rows) if weight.dim() == 3 and getattr(owner, "is_transposed", False) else (rows, columns)


def _misfit(expert: Expert, part: TensorSet, base_model: nn.Module) -> str:
    kind = expert.strategy
    try:
        reason = kind.misfit(part, base_model, expert.config)
    except AttributeError:
        return f"the base has no module '{part.name}'"
    return f"module '{part.name}': {reason}" if reason and not kind.before_text else reason


@cache
def skeleton(source: str, revision: str | None, task_type: TaskType, labels: int) -> nn.Module:
    """Build a base's model without weights, with a head for a number of labels if it is not 0."""
    import transformers

    names = {"id2label": {index: str(index) for index in range(labels)}} if labels else {}
    config = load_config(source, revision, **names)
    with torch.device("meta"):
        model: nn.Module = model_of_config(getattr(transformers, task_type.auto_model_for(config)), config)
    return model


def check_fits_on_disk(expert: Expert, task: Task) -> None:
    """Check an expert against the shapes of its base; no weight is read or downloaded.

    Nothing is checked if the base is not on this machine.
    """
    base = expert.base
    if base.folder is None:
        return
    try:
        classes = len(task.labels) if task.type.trains_head else 0
        found = skeleton(base.source, base.revision, task.type, classes)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PimergeError(f"the base '{base.name}' cannot be loaded for {task.file.type}: {reason}") from error
    check_fits(expert, found)


def delta_shape(layer: nn.Module) -> tuple[int, ...]:
    """(d_out, d_in) of a layer's update; a layer without a weight matrix has the shape ()."""
    weight = getattr(layer, "weight", None)
    if weight is None or weight.dim() < 2:
        return ()
    rows, columns = weight.shape[0], weight[0].numel()
    transposed = isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"
    return (columns, rows) if transposed else (rows, columns)
