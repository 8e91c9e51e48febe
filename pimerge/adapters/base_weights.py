"""Shapes and weights of a base's layers, read from its files; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pimerge.adapters.lora_module import LoraModule
from pimerge.adapters.merge_into import plan_merge_into
from pimerge.checkpoints.base import Base
from pimerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pimerge.checkpoints.key_mapping import is_fan_in_first, is_grouped, match_modules, names_at
from pimerge.core.errors import PimergeError, Problems

if TYPE_CHECKING:
    from torch import Tensor


def layer_shapes(base: Base, modules: Sequence[str], *, fan_in_fan_out: bool = False) -> dict[str, tuple[int, ...]]:
    """The shape of each module's weight as (d_out, d_in, *kernel), however the base stores it.

    Args:
        fan_in_fan_out: the field of the adapter's config; it decides how weights are stored where the model is unknown.
    """
    checkpoint = _open(base, "the shapes of its layers are needed")
    names = names_at(checkpoint.path)
    keys = match_modules(names, modules)
    problems = Problems()
    found = {}
    for name, key in keys.items():
        shape = checkpoint.entry((names.shared or {}).get(key, key)).shape
        if len(shape) < 2:
            problems.add(
                f"module '{name}': the base's weight is {shape}, not a matrix", "it was trained on another base"
            )
        turned = is_fan_in_first(names, name) if names.known else fan_in_fan_out
        found[name] = (*reversed(shape),) if turned and len(shape) == 2 else shape
    problems.raise_any("the expert does not fit its base")
    return found


def maybe_grouped(base: Base, modules: Mapping[str, LoraModule]) -> list[str]:
    """The convolutions with computed updates whose channels are divided into groups, or may be in an unknown model.

    The shape of a weight does not tell: (d_out, d_in / groups, kernel).
    """
    convolutions = [name for name, module in modules.items() if module.is_computed and module.layer == "conv"]
    if not convolutions or base.folder is None:
        return []
    names = names_at(base.folder)
    return [name for name in convolutions if not names.known or is_grouped(names, name)]


def _open(base: Base, reason: str) -> Checkpoint:
    if base.folder is None:
        raise PimergeError(
            f"{base.label} is not on this machine, but {reason}",
            "download it first (hf download NAME), or pass --base with its folder",
        )
    return open_checkpoint(base.folder)


def base_weights(base: Base, layouts: Mapping[str, LoraModule], *, fan_in_fan_out: bool) -> Callable[[str], Tensor]:
    """A function that reads a module's weight as (d_out × d_in), however the base stores it."""
    checkpoint = _open(base, "its weights are needed to convert the experts")
    plan = plan_merge_into(checkpoint, layouts, fan_in_fan_out=fan_in_fan_out)
    keys = {module: key for key, module in plan.weights.items()}

    def read(name: str) -> Tensor:
        weight = checkpoint.read(plan.source(keys[name]))
        return weight.T if keys[name] in plan.transposed else weight

    return read
