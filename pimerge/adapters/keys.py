"""Rules for key names that all kinds share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pimerge.core.errors import Problems

PREFIX = "base_model.model."
"""Of every name in PEFT's model, but for prompts and prefixes, which leave the model as it is."""
PROMPT_PREFIX = "base_model."


def sort_keys(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    slot_of: Callable[[str], tuple[str, str] | None],
    what: str,
    problems: Problems,
    prefix: str = PREFIX,
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The expert's keys by module and slot, and the head's by the parameter's name; every other key is a problem.

    Args:
        slot_of: (module, slot) of a key; None of one that is not the kind's.
        what: the kind's tensors, for messages.
    """
    saved = config.get("modules_to_save") or []
    keys: dict[str, dict[str, str]] = {}
    head, unknown = {}, []
    for key in sorted(shapes):
        if place := slot_of(key):
            keys.setdefault(place[0], {})[place[1]] = key
            continue
        name = key.removeprefix(prefix)
        if name != key and any(f".{saved_name}." in f".{name}" for saved_name in saved):
            head[name] = key
        else:
            unknown.append(key)
    if unknown:
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        problems.add(
            f"tensors that are neither {what} nor in modules_to_save: {shown}",
            "save the adapter with PEFT (for embeddings: save_embedding_layers=False); nothing is dropped silently",
        )
    if not keys and not problems.found:
        problems.add(f"it holds no {what}", "save the adapter again: model.save_pretrained(FOLDER)")
    return keys, head
