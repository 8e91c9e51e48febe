"""The values that adapters give tensors of the base which they do not update by a ΔW."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pimerge.adapters.base_changes import PlannedChange, changed_pieces, plan_changes
from pimerge.adapters.expert import Expert
from pimerge.adapters.lora_module import Factors
from pimerge.checkpoints.checkpoint import Checkpoint
from pimerge.checkpoints.key_mapping import match, names_of
from pimerge.core.errors import Problems
from pimerge.merging.verification.compared_tensor import HeldTensor, Part

Read = Callable[[Expert, str], Factors]
Values = Callable[[], Tensor]
"""Reads the values of a tensor when they are needed."""


def values_in_base(base: Checkpoint, expert: Expert, read: Read) -> dict[str, Callable[[], Part | None]]:
    """Key in the base → reads the values that an adapter gives a tensor: a bias, or what a kind without ΔW changes."""
    if not (expert.biases or expert.tensor_sets):
        return {}
    names, found, problems = names_of(base), dict[str, Callable[[], Part | None]](), Problems()
    shared = names.shared or {}

    def bias(parameter: str, key: str) -> HeldTensor | None:
        values = bias_values(expert, parameter, read, lambda: base.read(key))
        return None if values is None else HeldTensor(values)

    for parameter in expert.biases:
        with problems.collected():
            key = match(names, parameter, f"'{parameter}'")
            found[key] = partial(bias, parameter, key)
    changes_of = expert.strategy.base_changes
    if expert.tensor_sets and changes_of is None:
        problems.add(
            f"'{expert.name}' is of kind {expert.kind}, which no checkpoint can hold: {expert.strategy.why_not_into}",
            "compare it with adapters of its kind",
        )
    elif changes_of is not None:
        changes = [each for group in expert.tensor_sets.values() for each in changes_of(group, expert.config)]
        turned = bool(expert.config.get("fan_in_fan_out"))

        def changed(key: str, change: PlannedChange) -> HeldTensor:
            tensors = {change.key: expert.tensor(change.key)}
            return HeldTensor(torch.cat([piece.double() for piece in changed_pieces(base, key, change, tensors)]))

        for key, change in plan_changes(base, names, changes, fan_in_fan_out=turned, problems=problems).items():
            # a scaled layer that shares its weight is stored apart; replaced rows stay shared
            found[key if change.axis else shared.get(key, key)] = partial(changed, shared.get(key, key), change)
    problems.raise_any(f"the adapters do not fit the base '{base.path}'")
    return found


def bias_values(source: Expert, parameter: str, read: Read, base: Values) -> Tensor | None:
    """The bias of a layer in a model with an adapter: its trained values, and the update (``lora_bias``) on top."""
    module, trained = parameter.removesuffix(".bias"), source.biases.get(parameter)
    update = read(source, module) if module in source.modules and source.modules[module].bias else None
    if trained is None and update is None:
        return None
    value = source.tensor(trained) if trained is not None else base()
    if update is None:
        return value
    assert update.bias is not None
    return value.double() + update.scaling * update.bias.double()
