"""Pair tensors that adapters hold as a whole: those of kinds without ΔW, trained biases, embeddings and rows of them.

The claim is φ = φ0 + Σ w_n (φ_n − φ0), with φ0 the values of an adapter that changes nothing: a constant or the
base's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from pimerge.adapters.additive_tensors import BaseTensor, at_strength, neutral
from pimerge.adapters.compatibility import differing_form
from pimerge.adapters.expert import Expert
from pimerge.adapters.tensor_sets import read_slot
from pimerge.core.errors import PimergeError, Problems
from pimerge.merging.base_parameters import HeldParameter, held_embeddings
from pimerge.merging.verification.base_values import Read, Values, bias_values
from pimerge.merging.verification.compared_tensor import F64, HeldTensor
from pimerge.merging.verification.sources import Pairing
from pimerge.merging.verification.verdict import CheckedModule, Scaling, Verdict

_ONE = 1e-9


def pair_tensor_sets(merged: Expert, experts: Sequence[Expert], weights: Sequence[float], base: BaseTensor) -> Pairing:
    """Pair the tensors of adapters of one kind without ΔW."""
    sources, pairing, problems = _in_one_form([merged, *experts]), Pairing(), Problems()
    first = sources[1]
    for source in sources:
        reason = differing_form(first, source, f"'{first.name}'")
        if reason and (source.kind != first.kind or source.parts == first.parts):
            problems.add(f"'{source.name}': {reason}", "compare adapters of one kind and form")
    problems.raise_any("these adapters cannot be compared")
    slots = {(name, slot): each for e in sources for name, s in e.tensor_sets.items() for slot, each in s.slots.items()}
    for (name, slot_name), slot in sorted(slots.items()):

        def values(source: Expert, name: str = name, slot_name: str = slot_name) -> Tensor | None:
            own = source.tensor_sets.get(name)
            if own is None:
                return None
            held = at_strength(source, own.slots[slot_name], base)
            is_exact = source.strength == 1 and own.slots[slot_name].is_stored  # so that its own rounding is allowed
            return held.to(read_slot(own.slots[slot_name], source.tensor).dtype) if is_exact else held

        is_alone = not any(other != slot_name for known, other in slots if known == name)
        title = name if is_alone else f"{name}.{slot_name}"
        start = partial(neutral, slot, base) if slot.base else partial(torch.full, slot.shape, slot.neutral or 0.0)
        _add(pairing, title, [partial(values, source) for source in sources], start, weights, math.prod(slot.shape))
    return pairing


def _in_one_form(sources: Sequence[Expert]) -> list[Expert]:
    """Give adapters of one kind tensors of one form, where the kind says how."""
    form = sources[1].strategy.in_one_form
    if form is None or any(source.kind != sources[1].kind for source in sources):
        return list(sources)
    sets, fields = form([source.tensor_sets for source in sources])
    return [
        replace(source, tensor_sets=dict(own), config={**source.config, **fields})
        for source, own in zip(sources, sets, strict=True)
    ]


def pair_biases(
    pairing: Pairing, sources: Sequence[Expert], read: Read, weights: Sequence[float], base: BaseTensor
) -> None:
    """Add the biases of layers of which an adapter holds the trained values, with the updates that others add."""
    for parameter in sorted({name for source in sources for name in source.biases}):
        shape = next(s.file.entries[s.biases[parameter]].shape for s in sources if parameter in s.biases)
        zero = cache(lambda parameter=parameter: base(parameter))
        parts = [partial(bias_values, source, parameter, read, zero) for source in sources]
        _add(pairing, parameter, parts, zero, weights, math.prod(shape))


def pair_embeddings(pairing: Pairing, sources: Sequence[Expert], weights: Sequence[float], base: BaseTensor) -> None:
    """Add the embeddings that a merged adapter and the experts hold; one that is an expert's own is a remark."""
    held = [dict(held_embeddings(source)) for source in sources]
    merged = sources[0]
    for parameter in sorted({name for each in held for name in each}):
        owners = [source.name for source, each in zip(sources[1:], held[1:], strict=True) if parameter in each]
        if parameter not in held[0]:
            pairing.remarks.append(f"'{parameter}' of {', '.join(owners)} is not in '{merged.name}': it is the base's")
            continue
        if not owners:
            reason = "no expert holds it"
            pairing.beside.append(CheckedModule(parameter, Verdict.CHANGED, reason=reason))
            continue
        own = [None if (e := each.get(parameter)) is None else (s, e) for s, each in zip(sources, held, strict=True)]
        assert own[0] is not None
        found = merged.tensor(own[0][1].key)
        same = [s.name for s, e in filter(None, own[1:]) if _is_equal(found, own[0][1], s, e)]
        if same and len(sources) > 2:
            pairing.remarks.append(f"'{parameter}' is that of '{same[0]}'")
            continue
        _pair_rows(pairing, parameter, own, weights, base)


def _is_equal(found: Tensor, mine: HeldParameter, source: Expert, other: HeldParameter) -> bool:
    value = source.tensor(other.key)
    return mine.tokens == other.tokens and value.shape == found.shape and torch.equal(value.to(found.dtype), found)


def _pair_rows(
    pairing: Pairing,
    parameter: str,
    own: Sequence[tuple[Expert, HeldParameter] | None],
    weights: Sequence[float],
    base: BaseTensor,
) -> None:
    """Compare the rows that the base has or all hold; further ones, of added tokens, are a remark."""
    zero = cache(lambda: base(parameter))
    counts = [e.file.entries[each.key].shape[0] for e, each in filter(None, own) if each.tokens is None]
    with suppress(PimergeError):
        counts.append(len(zero()))
    every = sorted({token for _, each in filter(None, own) for token in each.tokens or ()})
    limit = min(counts, default=max(every, default=0) + 1)
    rows = [token for token in every if token < limit] if all(e[1].tokens for e in filter(None, own)) else range(limit)
    if len({*counts}) > 1 or any(token >= limit for token in every):
        pairing.remarks.append(f"the rows of '{parameter}' from {limit} on, of added tokens, are not part of the claim")
    if not rows:
        return

    def values(holder: tuple[Expert, HeldParameter] | None) -> Tensor | None:
        if holder is None:
            return None
        expert, each = holder
        stored = expert.tensor(each.key)
        if each.tokens is None:
            return stored[list(rows)]
        place = {token: number for number, token in enumerate(each.tokens)}
        return torch.stack([stored[place[t]] if t in place else zero()[t].to(stored.dtype) for t in rows])

    first = next(e.file.entries[each.key].shape for e, each in filter(None, own))
    parts = [partial(values, holder) for holder in own]
    _add(pairing, parameter, parts, lambda: zero()[list(rows)], weights, len(rows) * math.prod(first[1:]))


def _add(
    pairing: Pairing,
    name: str,
    parts: Sequence[Callable[[], Tensor | None]],
    zero: Values,
    weights: Sequence[float],
    count: int,
) -> None:
    """Add a comparison of values; φ0 drops out if it is not known, all hold the tensor and the weights sum to 1."""

    @cache
    def start() -> Tensor:
        try:
            return zero()
        except PimergeError:
            if abs(1 - sum(weights)) > _ONE or any(part() is None for part in parts):
                raise
            return torch.zeros(count, dtype=F64)

    def part(read: Callable[[], Tensor | None]) -> HeldTensor | None:
        values = read()
        return None if values is None else HeldTensor(values.reshape(-1))

    def base() -> HeldTensor:
        return HeldTensor(start().reshape(-1))

    pairing.add(name, (count, 1), base, [partial(part, each) for each in parts])
    pairing.scalings[name] = [Scaling()] * len(weights)
