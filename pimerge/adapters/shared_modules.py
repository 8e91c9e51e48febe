"""Which modules experts share: those of one name, whether an expert was trained on a base with or without its head.

The backbone alone (``layers.0…`` in transformers' ``AutoModel``) is a part of the model with a head, where its modules
have the backbone's prefix (``model.layers.0…``). Experts of both are written for the model with the head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pimerge.adapters.expert import Expert, checked
from pimerge.adapters.format import PEFT
from pimerge.adapters.module_names import with_canonical_names
from pimerge.adapters.source import AdapterSource
from pimerge.adapters.tool_names import with_one_naming
from pimerge.checkpoints.backbone_prefixes import BACKBONES
from pimerge.checkpoints.known_modules import known_modules
from pimerge.core.errors import Problems


def with_one_prefix(experts: Sequence[Expert]) -> list[Expert]:
    """Add the backbone's prefix to the names of experts without it, if others adapt the same modules with it.

    Files of other formats than PEFT's get the names of the first; see :mod:`pimerge.adapters.tool_names`.

    The prefix is the base's own. If the base is not on this machine, it is the first part of the others' names, where
    that is a backbone's in transformers and makes the modules of both those of the same layers. An expert for which two
    prefixes are possible is left.
    """
    experts = with_one_naming(experts)
    names = [_names(expert) for expert in experts]
    others = {each: expert for each, expert in zip(names[::-1], experts[::-1], strict=True) if each}
    found = []
    for expert, own in zip(experts, names, strict=True):
        fitting = {prefix: other for each, other in others.items() if (prefix := _prefix(own, each, expert))}
        found.append(_prefixed(expert, *fitting.popitem()) if len(fitting) == 1 else expert)
    return found


def _names(expert: Expert) -> frozenset[str]:
    """The full names of the modules that an expert adapts or replaces; empty for one whose names are not PEFT's."""
    if expert.format != PEFT or expert.unhandled:
        return frozenset()
    return frozenset(expert.parts) | {name.rpartition(".")[0] for name in expert.head}


def _prefix(own: frozenset[str], other: frozenset[str], expert: Expert) -> str:
    """The prefix of all names of the other's backbone that an expert's names lack; empty if there is none."""
    from pimerge.checkpoints.architecture import is_of_head  # imports torch

    if own == other or not own:
        return ""
    firsts = {name.partition(".")[0] for name in other if not is_of_head(name)}
    if len(firsts) != 1 or any(name.partition(".")[0] in firsts for name in own):
        return ""
    (prefix,) = firsts
    base = known_modules(expert.base.folder) if expert.base.folder is not None else None
    if base is not None and prefix == base.prefix:
        is_whole = not any(name.startswith(f"{prefix}.") for name in base.modules)  # a backbone was saved alone
        places = {name: base.place(name, "CAUSAL_LM") for name in own}
        if all(place in (f"{prefix}.{name}", name if is_whole else None) for name, place in places.items()):
            return prefix
    if base is not None or prefix not in BACKBONES or any(name.partition(".")[0] in BACKBONES for name in own):
        return ""
    layers = _layers(name.partition(".")[2] for name in other if name.startswith(f"{prefix}."))
    return prefix if _layers(own) & layers else ""


def _layers(names: Iterable[str]) -> set[str]:
    """The modules that hold others, without their numbers."""
    return {re.sub(r"\d+", "0", name.rpartition(".")[0]) for name in names} - {""}


@dataclass(frozen=True)
class _Prefixed:
    """A base of which the modules of an adapter are the backbone's."""

    prefix: str

    def place_all(self, names: Iterable[str], task_type: str | None = None) -> dict[str, str | None]:
        return {name: f"{self.prefix}.{name}" for name in names}


def _prefixed(expert: Expert, prefix: str, like: Expert) -> Expert:
    """Read an expert again with a prefix before its names, as an adapter of another's class of model."""
    source = AdapterSource(expert.path, expert.config, expert.file, expert.format, expert.config_file)
    source, names = with_canonical_names(source, expert.strategy, _Prefixed(prefix))
    fields: dict[str, Any] = {name: like.config.get(name) for name in ("task_type", "auto_mapping")}
    source = replace(source, config={**source.config, **fields})
    opened = checked(source, expert.base_override, convert=True, only_look=False)
    renamed = {old: names.get(new, new) for old, new in expert.renamed.items()}
    renamed |= {old: new for old, new in names.items() if old not in expert.renamed.values()}
    return replace(opened, label=expert.label, renamed=renamed).with_strength(expert.strength)


def require_shared_modules(experts: Sequence[Expert]) -> None:
    """Refuse experts that do not share modules, directly or through others: they may be the same under other names.

    Experts without ΔW always share the form of their tensors.
    """
    left = [expert for expert in experts if expert.modules]
    if not left:
        return
    first = left[0]
    known = set(first.modules)
    while near := [expert for expert in left if known & expert.modules.keys()]:
        known.update(*(expert.modules for expert in near))
        left = [expert for expert in left if not known & expert.modules.keys()]
    problems = Problems()
    for expert in left:
        if refuse_names([expert, first], problems):
            continue
        problems.add(
            f"'{expert.name}' and '{first.name}' share no module: the one adapts '{min(expert.modules)}', the other "
            f"'{min(first.modules)}'",
            "if these are the same modules under other names, pass --base with their base's folder, and state the same "
            "task_type in each adapter_config.json; if they were trained on different modules on purpose, pass "
            "--allow-disjoint",
        )
    problems.raise_any("these experts share no module")
    _refuse_longer_names(experts, problems)
    problems.raise_any("some experts may name the same modules differently")


def _refuse_longer_names(experts: Sequence[Expert], problems: Problems) -> None:
    """Add a problem for an expert whose own modules are another's with one more part in each name.

    That part is probably a wrapper's, also if other modules, such as embeddings, have the same name in both. With the
    base on this machine its names decide, so only the others are looked at.
    """
    for one in experts:
        for other in experts:
            own = one.modules.keys() - other.modules.keys()
            if one.base.folder is not None or not own:
                continue
            parts = {part for name in own for part in name.split(".") if not part.isdecimal()}
            lacking = other.modules.keys() - one.modules.keys()
            extra = next((part for part in sorted(parts) if all(_without(name, part) in lacking for name in own)), None)
            if extra is not None:
                problems.add(
                    f"'{one.name}' adapts '{min(own)}' where '{other.name}' adapts '{_without(min(own), extra)}'",
                    f"if '{extra}' is the name of a wrapper, save the adapter from the plain model, or pass --base "
                    "with the base's folder; if these are two modules, pass --allow-disjoint",
                )


def _without(name: str, part: str) -> str:
    return ".".join(each for each in name.split(".") if each != part)


def refuse_names(experts: Sequence[Expert], problems: Problems) -> bool:
    """Add a problem for each expert that adapts modules which its base does not have; True if there is one.

    Heads do not count: a tied one is not in the base's file, and a task's own is only in the model that was trained.
    """
    from pimerge.checkpoints.architecture import is_of_head  # imports torch

    found = False
    for expert in experts:
        base = None if expert.base.folder is None else known_modules(expert.base.folder)
        lacking = [] if base is None else [name for name in expert.parts if not is_of_head(name) and not base.has(name)]
        if lacking:
            found = True
            more = f" and {len(lacking) - 1} others" if len(lacking) > 1 else ""
            problems.add(
                f"'{expert.name}' adapts '{lacking[0]}'{more}, which {expert.base.label} does not have",
                "if a program put the name of its wrapper into the keys, rename them or save the adapter from the "
                "plain model; if it was trained on another base, pass that with --base",
            )
    return found
