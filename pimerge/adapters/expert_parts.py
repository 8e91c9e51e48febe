"""Determine an expert's kind, base, modules and tensor sets from its config and the shapes of its tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from pimerge.adapters import unhandled
from pimerge.adapters.kind import KINDS, AdapterHeader, Kind, Parts
from pimerge.adapters.lora_module import LoraModule
from pimerge.adapters.module_names import with_canonical_names
from pimerge.adapters.source import AdapterSource
from pimerge.adapters.tensor_sets import TensorSet
from pimerge.checkpoints.base import Base, find_base, given_base
from pimerge.checkpoints.dtypes import EIGHT_BITS, FLOATS
from pimerge.checkpoints.empty_tensors import refuse_empty
from pimerge.checkpoints.known_modules import known_modules
from pimerge.core.errors import PimergeError

_FLOATS = frozenset((*FLOATS, *EIGHT_BITS))
# buffers of a head, such as BatchNorm's num_batches_tracked
_INTEGERS = frozenset(("I64", "I32", "I16", "I8", "U8", "BOOL"))


@lru_cache(maxsize=32)
def parsed(kind: str, config: str, shapes: tuple[tuple[str, tuple[int, ...]], ...], convert: bool) -> Parts:
    """Parse the parts and the head of an expert; cached, since most experts of a pool have the same.

    Args:
        kind: empty for an expert that can only be inspected.
    """
    header = AdapterHeader(json.loads(config), dict(shapes), convert)
    return KINDS.load(kind).parse(header) if kind else unhandled.parse(header)


def parsed_with_base(
    kind: Kind, path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], base: str | None, convert: bool
) -> Parts:
    """Parse an expert of a kind whose layout depends on the shapes of the base's layers."""

    def layers(modules: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
        from pimerge.adapters.base_weights import layer_shapes  # imports torch

        return layer_shapes(base_of(path, config, base), modules, fan_in_fan_out=bool(config.get("fan_in_fan_out")))

    return kind.parse(AdapterHeader(config, shapes, convert, layers))


def parts_of(
    source: AdapterSource, kind: Kind | None, reason: str, base: str | None, convert: bool, only_look: bool
) -> tuple[Mapping[str, LoraModule | TensorSet], dict[str, str], str]:
    """Parse the parts and the head of an expert, and why it can only be inspected, if so.

    Args:
        kind: None for an adapter that can only be inspected.
        reason: why it can only be inspected; empty if it is handled.
        base: the base given in place of the one that the adapter names.
    """
    if source.modules is not None:
        return source.modules, {}, reason
    shapes = {key: entry.shape for key, entry in source.file.entries.items()}
    refuse_empty(shapes, "the adapter")
    if kind is not None and kind.reads_base:
        try:
            parts, head = parsed_with_base(kind, source.path, source.config, shapes, base, convert or only_look)
            if parts:
                return parts, head, reason
        except PimergeError as error:
            if not only_look or base_of(source.path, source.config, base).folder is not None:
                raise
            reason = error.problems[0].message
    name = kind.name if kind is not None and not reason else ""
    return *parsed(name, json.dumps(source.config), tuple(shapes.items()), convert), reason


def base_of(path: Path, config: dict[str, Any], override: str | None) -> Base:
    """The base of an expert at a path, or the base given in its place."""
    if override:
        return given_base(override)
    return find_base(config.get("base_model_name_or_path"), config.get("revision"), path)


def canonical(source: AdapterSource, kind: Kind | None, override: str | None) -> tuple[AdapterSource, dict[str, str]]:
    """Give a PEFT adapter canonical names, by those of its base's modules if the base is on this machine.

    Args:
        kind: None for an adapter that can only be inspected.
        override: the base given in place of the one that the adapter names.
    """
    if kind is None or source.modules is not None:
        return source, {}
    known = None
    if override or isinstance(source.config.get("base_model_name_or_path"), str):
        with suppress(PimergeError):  # whoever needs the base is told
            base = base_of(source.path, source.config, override)
            known = None if base.folder is None else known_modules(base.folder)
    return with_canonical_names(source, kind, known)


def kind_of(config: dict[str, Any]) -> tuple[str, str]:
    """The kind in a config, and why it can only be inspected; empty if it is handled."""
    peft_type = str(config.get("peft_type"))
    kind = next((kind.name for kind in KINDS if kind.peft_type == peft_type), None)
    if kind is not None:
        return kind, ""
    if reason := unhandled.why_unhandled(peft_type):
        return peft_type.lower(), reason
    if not config.get("peft_type"):
        raise PimergeError(
            "adapter_config.json has no peft_type",
            "if PEFT wrote the tensors, add what is missing; a LoRA has peft_type LORA, r and lora_alpha",
        )
    raise PimergeError(
        f"its peft_type is '{peft_type}', which is not handled", f"pimerge reads the kinds: {', '.join(KINDS.names())}"
    )


def require_floats(dtypes: Iterable[str], head: Iterable[str]) -> None:
    """Refuse tensors that are not floating-point numbers; a head may have integers."""
    other = {*dtypes} - _FLOATS | {*head} - _FLOATS - _INTEGERS
    if other:
        found = ", ".join(sorted(other))
        raise PimergeError(f"it holds tensors stored as {found}", "save the adapter as F16, BF16, F32 or F64")
