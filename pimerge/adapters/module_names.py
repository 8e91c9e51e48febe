"""One name for each module of an adapter, whatever program wrapped the model that was trained.

The canonical key of a tensor is the one that PEFT writes today: its prefix once, the module's name in the plain model
of today's transformers, and no adapter name. Wrappers (``_orig_mod``, ``module``), doubled or missing prefixes, names
of adapters (``lora_A.default.weight``) and modules that transformers has renamed are brought to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from typing import Any, Protocol

from pimerge.adapters.keys import PREFIX, PROMPT_PREFIX, is_saved
from pimerge.adapters.kind import Kind
from pimerge.adapters.lora_module import pattern_value
from pimerge.adapters.source import AdapterSource
from pimerge.checkpoints.base_modules import is_private_wrapper, is_wrapper
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.patterns import matches

_COPY = ".original_module."  # the base's own module, which PEFT keeps beside the trained one
_TWICE = re.compile(rf"{re.escape(_COPY)}|\.modules_to_save\.(?=(?:weight|bias)$)")
"""In keys that PEFT writes beside the one that it loads, such as those of a trained embedding that was resized."""
_SAVED = re.compile(r"\.modules_to_save\.(?P<adapter>[^.]+)(?=\.)")


@dataclass(frozen=True)
class _Key:
    """The parts of a key: what is before PEFT's prefix, the owner of the tensor, and the rest.

    Attributes:
        lead: names before PEFT's prefix.
        owner: full name of the module in the trained model; empty for a tensor that belongs to none.
        end: the rest of the key, without an adapter's name.
        adapter: the adapter's name in the key; empty if there is none.
        is_head: whether the tensor replaces a parameter of the base.
    """

    lead: tuple[str, ...]
    owner: str
    end: str
    adapter: str = ""
    is_head: bool = False


_Place = tuple[tuple[str, ...], str]
"""``lead`` and ``owner`` of a key."""


class ModulePlaces(Protocol):
    """The modules of a base."""

    def place_all(self, names: Iterable[str], task_type: str | None = None) -> dict[str, str | None]:
        """Name in an adapter of this task type → name today; None if the base has no such module."""


def with_canonical_names(
    source: AdapterSource, kind: Kind, base: ModulePlaces | None
) -> tuple[AdapterSource, dict[str, str]]:
    """Return an adapter under canonical keys, and the modules whose names changed; its tensors stay where they are.

    Args:
        base: the modules of its base; None if the base is unknown.
    """
    trained = {_SAVED.sub("", key) for key in source.file.entries if _SAVED.search(key)}
    trained |= {key for key in source.file.entries if _COPY not in key}
    used = [key for key in source.file.entries if (plain := _TWICE.sub(".", key)) == key or plain not in trained]
    keys = {key: _parts(key, kind) for key in used}
    adapters = sorted({part.adapter for part in keys.values() if part.adapter})
    if len(adapters) > 1:
        raise PimergeError(
            f"it holds the tensors of several adapters: {', '.join(adapters)}",
            "save each in a folder of its own: model.save_pretrained(FOLDER, selected_adapters=[NAME])",
        )
    names = _canonical(keys.values(), base, source.config.get("task_type"))
    problems, entries = Problems(), {}
    origin: dict[str, str] = {}
    for key, part in keys.items():
        name = names[part.lead, part.owner]
        prefix = kind.prefix if part.owner else ""
        canonical = f"{prefix}{name}{'.' if name else ''}{part.end}"
        if canonical in entries:
            problems.add(
                f"{origin[canonical]} and {key} are both the tensor {canonical}",
                "keep one of them: the other is from another adapter or another save",
            )
        entries[canonical], origin[canonical] = source.file.entries[key], key
    problems.raise_any("two tensors have one name")
    changed = {part.owner: names[part.lead, part.owner] for part in keys.values() if part.owner}
    changed = {old: new for old, new in changed.items() if old != new}
    if list(entries) == list(source.file.entries):
        return source, changed
    config = _renamed_config(source.config, keys.values(), names) if changed else source.config
    return replace(source, config=config, file=replace(source.file, entries=entries)), changed


@cache
def _pattern(slots: tuple[str, ...]) -> re.Pattern[str]:
    """Matches a key without prefix: module, slot, and the adapter's name if there is one."""
    starts = "|".join((*map(re.escape, slots), r"token_adapter\.trainable_tokens_"))
    return re.compile(
        rf"(?:(?P<module>.+)\.)?(?P<slot>(?:{starts})\w*)"
        r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?P<end>\.(?:weight|bias))?"
    )


def _parts(key: str, kind: Kind) -> _Key:
    outer = "".join(f"{part}." for part in takewhile(is_wrapper, key.split(".")))
    if kind.before_text and key.removeprefix(outer) == "prompt_embeddings":
        return _Key((), "", "prompt_embeddings")
    if kind.before_text and (match := re.fullmatch(r"(?:.+\.)?prompt_encoder\.([^.]+)\.embedding\.weight", key)):
        return _Key((), "", "prompt_embeddings", match[1])
    lead, name = _without_prefix(key, kind.prefix)
    pattern = _pattern(kind.slots) if kind.slots else None
    shared = key.removeprefix(outer)
    if pattern and shared.startswith(PROMPT_PREFIX) and not shared.startswith(PREFIX):
        match = pattern.fullmatch(shared.removeprefix(PROMPT_PREFIX))  # a tensor that all layers share
        if match and not match["module"]:
            return _Key((), "", f"{PROMPT_PREFIX}{match['slot']}{match['end'] or ''}", match["adapter"] or "")
    match = pattern.fullmatch(name) if pattern else None
    if match and match["module"]:
        return _Key(lead, match["module"], f"{match['slot']}{match['end'] or ''}", match["adapter"] or "")
    if "." not in name:
        return _Key((), "", key)
    adapter = (found := _SAVED.search(name)) and found["adapter"]
    owner, _, end = _SAVED.sub("", name).rpartition(".")
    return _Key(lead, owner, end, adapter or "", is_head=True)


def _without_prefix(key: str, prefix: str) -> _Place:
    """What is before PEFT's prefix, which may be there twice or be missing, and what is after it.

    >>> _without_prefix("module.base_model.model.base_model.model.q.lora_A.weight", "base_model.model.")
    ((), 'q.lora_A.weight')
    """
    before, found, name = f".{key}".rpartition(f".{prefix}")
    if not found:
        return (), key
    lead = f"{before}.".replace(f".{prefix}", ".").strip(".").split(".")
    return tuple(part for part in lead if part and not is_wrapper(part)), name


def _canonical(keys: Iterable[_Key], base: ModulePlaces | None, task_type: Any) -> dict[_Place, str]:
    """(lead, owner) → canonical name."""
    parts = {(key.lead, key.owner): key.is_head for key in keys}
    task = task_type if isinstance(task_type, str) else None
    best: dict[_Place, str] = {}
    most = -1
    for form in _forms(list(parts)):
        plain = {place: _without_layers(form(place)) for place in parts}
        today = {} if base is None else base.place_all((name for name, _ in plain.values() if name), task)
        found = {place: now + end if (now := today.get(name)) else None for place, (name, end) in plain.items()}
        known = sum(name is not None for place, name in found.items() if not parts[place])
        if known > most:
            most = known
            best = {place: form(place) if name is None else name for place, name in found.items()}
    return best


def _forms(places: Sequence[_Place]) -> list[Callable[[_Place], str]]:
    """The possible names of a module: the likeliest for a base that is unknown comes first."""

    def without(dropped: Callable[[str], bool], *, lead: bool = False) -> Callable[[_Place], str]:
        def form(place: _Place) -> str:
            parts = [*(place[0] if lead else ()), *place[1].split(".")]
            return ".".join(part for part in parts if not dropped(part))

        return form

    private, every = without(is_private_wrapper), without(is_wrapper)
    is_wrapped = all(is_wrapper(private(place).partition(".")[0]) for place in places if place[1])
    first = [every, private] if is_wrapped else [private, every]
    return [*first, lambda place: place[1], without(is_wrapper, lead=True)]


def _without_layers(name: str) -> tuple[str, str]:
    """The name of a module, and the part that PEFT's wrappers of several of its parameters add.

    >>> _without_layers("experts.base_layer.base_layer")
    ('experts', '.base_layer.base_layer')
    """
    plain = name
    while plain.endswith(".base_layer"):
        plain = plain.removesuffix(".base_layer")
    return plain, name.removeprefix(plain)


def _renamed_config(config: Mapping[str, Any], keys: Iterable[_Key], names: Mapping[_Place, str]) -> dict[str, Any]:
    """The config with every module by its canonical name; what it says of the modules stays."""
    parts = list(keys)
    modules = {key.owner: names[key.lead, key.owner] for key in parts if key.owner and not key.is_head}
    heads = {f"{key.owner}.{key.end}": names[key.lead, key.owner] for key in parts if key.is_head}
    renamed = dict(config)
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field)
        if isinstance(pattern, dict) and all(isinstance(value, int | float) for value in pattern.values()):
            values = {
                new: pattern_value(pattern, old, pattern_value(pattern, new, None)) for old, new in modules.items()
            }
            given = {new: value for new, value in values.items() if value is not None}
            renamed[field] = {f"^{re.escape(name)}": given[name] for name in sorted(given)}
    if config.get("target_modules"):
        renamed["target_modules"] = sorted(set(modules.values()))
    if isinstance(parameters := config.get("target_parameters"), list):
        owners = {old.removesuffix(".base_layer"): new.removesuffix(".base_layer") for old, new in modules.items()}
        places = [str(name).rpartition(".") for name in parameters]
        renamed["target_parameters"] = [f"{owners.get(owner, owner)}{dot}{leaf}" for owner, dot, leaf in places]
    if "feedforward_modules" in config:
        targets = config["feedforward_modules"]
        renamed["feedforward_modules"] = sorted({new for old, new in modules.items() if _is_target(old, targets)})
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if config.get(field):
            renamed[field] = None
    if saved := config.get("modules_to_save"):
        renamed["modules_to_save"] = _saved(saved, heads)
    return renamed


def _is_target(name: str, targets: Any) -> bool:
    """Whether PEFT counts a module among ``target_modules``: a regular expression, or endings."""
    if isinstance(targets, str):
        return matches(targets, name)
    return any(f".{name}".endswith(f".{target}") for target in targets or ())


def _saved(saved: Any, heads: Mapping[str, str]) -> Any:
    """The entries of ``modules_to_save`` that still match, and the modules that none of them matches any more."""
    if not isinstance(saved, list) or not all(isinstance(entry, str) for entry in saved):
        return saved  # the kind reports it
    own = {name: owner for name, owner in heads.items() if is_saved(name, saved)}
    kept = [entry for entry in saved if any(is_saved(f"{owner}.", [entry]) for owner in own.values())]
    lost = sorted({owner for owner in own.values() if not is_saved(f"{owner}.", kept)})
    return [*kept, *lost]
