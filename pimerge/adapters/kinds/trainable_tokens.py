"""Trainable tokens: trained rows of an embedding, and of an output layer that is tied to it, replace the base's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pimerge.adapters.kind import AdapterHeader, Kind, Parts, TensorSets
from pimerge.adapters.kinds._config_fields import CommonFields
from pimerge.adapters.kinds._tensor_sets import parse_tensor_sets
from pimerge.adapters.tensor_sets import BaseChange, Effect, TensorSet, TensorSlot

if TYPE_CHECKING:
    from torch import nn

_ROWS = "trainable_tokens_delta"  # PEFT's name for the trained rows themselves
_KEY = re.compile(rf"(?P<module>.+)\.(?P<slot>{_ROWS})")
_FIELD = "token_indices"


class _Fields(CommonFields):
    """The fields that are read, with their types."""

    token_indices: list[int] | None = None


def parse(header: AdapterHeader) -> Parts:
    """Read the layout of an expert of trained rows; see :mod:`pimerge.adapters.kind`.

    >>> sets, _ = parse(AdapterHeader({"token_indices": [5, 2]},
    ...     {"base_model.model.wte.trainable_tokens_delta": (2, 4)}))
    >>> sets["wte"].slots["trainable_tokens_delta"].rows
    (5, 2)
    """
    tokens = header.config.get(_FIELD)

    def slot(module: str, name: str, key: str, shape: tuple[int, ...]) -> TensorSlot | str:
        rows = tuple(tokens) if isinstance(tokens, list) else ()
        if len(shape) != 2 or len({*rows}) != shape[0] or len(rows) != shape[0] or min(rows) < 0:
            return f"expected a row for each of the {len(rows)} tokens in {_FIELD} of adapter_config.json"
        return TensorSlot(key, shape, base=f"{module}.weight", rows=rows)

    return parse_tensor_sets(header, _KEY, "rows of tokens", slot, frozenset({_ROWS}), fields=_Fields)


def of_all_tokens(experts: Sequence[TensorSets]) -> tuple[list[TensorSets], dict[str, Any]]:
    """Give every expert the rows of all the experts' tokens; those that it did not train are the base's."""
    slots = (slot for sets in experts for each in sets.values() for slot in each.slots.values())
    tokens = tuple(dict.fromkeys(row for slot in slots for row in slot.rows))
    return [{name: _extended(each, tokens) for name, each in sets.items()} for sets in experts], {_FIELD: [*tokens]}


def _extended(group: TensorSet, tokens: tuple[int, ...]) -> TensorSet:
    slots = {
        name: slot
        if slot.rows == tokens
        else replace(slot, shape=(len(tokens), slot.shape[1]), rows=tokens, stored_rows=slot.rows)
        for name, slot in group.slots.items()
    }
    return TensorSet(group.name, slots)


def base_changes(group: TensorSet, config: Mapping[str, Any]) -> list[BaseChange]:
    """The rows of the base that the trained ones replace."""
    return [
        BaseChange(f"{group.name}.weight", slot.key, slot.shape, Effect.ROWS_REPLACED, rows=slot.rows)
        for slot in group.slots.values()
    ]


def misfit(group: TensorSet, model: nn.Module, config: Mapping[str, Any]) -> str:
    """Why a tensor set does not fit a base; empty if it fits."""
    slot, module = group.slots[_ROWS], model.get_submodule(group.name)
    weight = getattr(getattr(module, "original_module", module), "weight", None)
    shape = () if weight is None else tuple(weight.shape)
    fits = shape[1:] == slot.shape[1:] and max(slot.rows) < shape[0]
    return "" if fits else f"it holds {slot.shape} for tokens up to {max(slot.rows)}, but the base's weight is {shape}"


KIND = Kind(
    name="trainable-tokens",
    summary="Trained rows of an embedding in place of the base's.",
    formula="e(t) = e'(t) for the chosen tokens t",
    paper="PEFT's trainable tokens",
    peft_type="TRAINABLE_TOKENS",
    slots=("trainable_tokens_",),
    meaning_fields=(_FIELD,),
    base_changes=base_changes,
    in_one_form=of_all_tokens,
    misfit=misfit,
    parse=parse,
)
