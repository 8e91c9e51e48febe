"""Describe a merge before it runs: special cases, parts that are left out, memory and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pimerge.adapters.bare_parameter import is_by_expert
from pimerge.adapters.expert import Expert
from pimerge.adapters.format import PEFT
from pimerge.adapters.head import Head
from pimerge.adapters.low_rank import EVERYTHING
from pimerge.merging.method import Space
from pimerge.merging.request import EntrySpace
from pimerge.merging.update_merge import UpdateMerge

_FLOAT64 = 8


@dataclass(frozen=True)
class UpdatePlan:
    """The description of a merge.

    Attributes:
        modules: number of merged modules.
        handled: differences between the experts and how they are handled, one sentence each.
        left_out: parts that are not in the result and why, one sentence each.
        memory: approximate memory for the largest module, in bytes.
        size: maximum size of the result, in bytes.
    """

    modules: int
    handled: list[str]
    left_out: list[str]
    memory: int
    size: int


def plan_of(merge: UpdateMerge, given: Sequence[Expert], head: Head) -> UpdatePlan:
    """Describe a merge.

    Args:
        given: the experts before equal ones are joined.
        head: the task head of the result.
    """
    heads = sum(tensor.numel() * tensor.itemsize for tensor in head.tensors.values())
    return UpdatePlan(
        len(merge.names),
        _handled(merge),
        _left_out(merge, given, head),
        max(_memory(merge, name) for name in merge.names),
        heads + sum(_numbers(merge, name) for name in merge.names) * merge.dtype.itemsize,
    )


def _handled(merge: UpdateMerge) -> list[str]:
    experts = merge.experts
    base = experts[0].base
    found = [f"'{name}' is given {count} times: its weights are added" for name, count in merge.joined.items()]
    if base.is_missing:
        what = f"name {base.label}, which is not on this machine" if base.name else "name no base"
        found.append(f"the experts {what}: a merge does not need it, and --base checks it")
    reduced = [f"'{expert.name}' × {expert.strength:g}" for expert in experts if expert.strength != 1]
    if reduced:
        found.append(f"updates with a strength other than 1: {', '.join(reduced)}")
    stabilised = [expert.name for expert in experts if expert.config.get("use_rslora")]
    if 0 < len(stabilised) < len(experts):
        found.append(f"rsLoRA (alpha / √r) in {_names(stabilised)}, alpha / r in the others: each with its own scaling")
    ranks = {expert.name: expert.ranks for expert in experts}
    if len(set(ranks.values())) > 1:
        found.append("different ranks: " + ", ".join(f"{n} {'/'.join(map(str, r))}" for n, r in ranks.items()))
    scalings = sorted({module.scaling for expert in experts for module in expert.modules.values()})
    if len(scalings) > 1:
        found.append(f"different scalings, from {scalings[0]:g} to {scalings[-1]:g}: each is part of its ΔW")
    dtypes = sorted({dtype for expert in experts for dtype in expert.dtypes})
    if len(dtypes) > 1:
        found.append(
            f"different dtypes ({', '.join(dtypes)}): the result has {str(merge.dtype).removeprefix('torch.')}"
        )
    partial = [name for name in merge.names if not all(name in expert.modules for expert in experts)]
    if partial:
        found.append(
            f"{len(partial)} modules are adapted by some of the experts only, such as '{partial[0]}': "
            "the others count as a zero update there, with their weight"
        )
    turned = [expert.name for expert in experts if is_by_expert(expert.modules.values())]
    if turned:
        found.append(f"Unsloth's order of a mixture's experts in {_names(turned)}: PEFT's in the result")
    for expert in experts:
        if expert.is_computed and expert.format == PEFT:
            found.append(f"'{expert.name}' is of kind {expert.kind}: its ΔW is computed and goes into the LoRA")
        conversions = {conversion for module in expert.modules.values() for conversion in module.conversions}
        if conversions:
            kinds = ", ".join(sorted(conversions))
            found.append(f"'{expert.name}' is {kinds}: converted to ΔW with the base's weights")
    if merge.has_bias and merge.method.space is not Space.LINEAR:
        found.append("bias updates are summed with the weights")
    return found


def _left_out(merge: UpdateMerge, given: Sequence[Expert], head: Head) -> list[str]:
    every = sorted({name for expert in given for name in expert.modules})
    found = []
    dropped = [name for name in every if name not in merge.weights]
    if dropped:
        found.append(f"{len(dropped)} modules by --include and --exclude, such as '{dropped[0]}'")
    unused = [
        expert.name for i, expert in enumerate(merge.experts) if not any(values[i] for values in merge.weights.values())
    ]
    if unused:
        found.append(f"{_names(unused)}: weight 0 everywhere")
    heads = list(dict.fromkeys(expert.name for expert in given if expert.head))
    if heads and not head.tensors:
        found.append(f"the heads of {_names(heads)}: the result has none")
    return found


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _width(merge: UpdateMerge, name: str) -> int:
    layout = merge.layout(name)
    return layout.d_out + layout.d_in


def _numbers(merge: UpdateMerge, name: str) -> int:
    """Return the maximum number of entries in the result's factors and bias."""
    return _rank(merge, name) * _width(merge, name) + (merge.layout(name).d_out if merge.has_bias else 0)


def _stacked(merge: UpdateMerge, name: str) -> int:
    """Return Σ r_n."""
    return sum(expert.modules[name].full_rank for expert in merge.experts if name in expert.modules)


def _rank(merge: UpdateMerge, name: str) -> int:
    """Return the maximum rank of the result."""
    layout = merge.layout(name)
    limit = min(layout.d_out, layout.d_in)
    if merge.by_factor:
        most = layout.rank
    else:
        most = limit if merge.space is EntrySpace.DELTA else min(limit, _stacked(merge, name))
    return min(most, merge.truncation.rank or most)


def _memory(merge: UpdateMerge, name: str) -> int:
    """Return the approximate size of the tensors in memory for one module, in bytes."""
    layout, count = merge.layout(name), len(merge.experts)
    stacked = _stacked(merge, name)
    inputs = stacked * _width(merge, name) * 4
    result = _rank(merge, name) * _width(merge, name) * merge.dtype.itemsize
    if (merge.method.space is Space.LINEAR and merge.truncation == EVERYTHING) or merge.space is EntrySpace.FACTORS:
        return inputs + result
    basis = 2 * stacked * _width(merge, name) * _FLOAT64
    if merge.space is EntrySpace.DELTA:
        return inputs + (3 * count * 4 + 4 * _FLOAT64) * layout.d_out * layout.d_in
    if merge.method.space is Space.INPUTS:
        return inputs + basis + (count + 3) * layout.d_in**2 * _FLOAT64
    rows, columns = min(stacked, layout.d_out), min(stacked, layout.d_in)
    if merge.method.space is Space.ROWS:
        return inputs + basis + 4 * count * rows * layout.d_in * _FLOAT64
    return inputs + basis + 3 * count * rows * columns * _FLOAT64
