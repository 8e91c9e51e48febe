"""Map the keys of a checkpoint to transformers' parameter names and to the modules of an adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from pimerge.checkpoints.architecture import is_of_head
from pimerge.checkpoints.checkpoint import CONFIG, Checkpoint, open_checkpoint
from pimerge.checkpoints.renaming import renaming_of, transforms_of
from pimerge.core.errors import PimergeError, Problems, nearest

# Prefixes that programs put before the names of a diffusion model.
_DIFFUSION = re.compile(r"^(?:model_diffusion_model|diffusion_model|(?:lora_)?unet|(?:lora_)?transformer)_")

UNBUILDABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)
"""What building a model raises for a config that does not fit its class."""


@dataclass(frozen=True)
class Names:
    """The tensors of a checkpoint and their parameter names in the loaded model.

    Attributes:
        parameter: key on disk → parameter name; the key itself if the name is unknown or unused.
        known: all parameter names; empty if transformers does not know the model.
        converted: parameters that are made from several tensors or from changed ones → the operations, by name.
        groups: sets of tied parameters.
        sources: the parameter of each group that transformers ties the others to.
        shared: parameters that are not on disk → key of the tensor that they share.
        prefix: prefix of the backbone in a model with a head, such as ``bert``.
        fan_in_first: modules that store their weights (d_in × d_out).
        grouped: convolutions whose channels are divided into groups.
        rename: key on disk, also of older versions → parameter name.
    """

    parameter: dict[str, str]
    known: frozenset[str] = frozenset()
    converted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    groups: tuple[frozenset[str], ...] = ()
    shared: Mapping[str, str] | None = None
    prefix: str = ""
    fan_in_first: frozenset[str] = frozenset()
    grouped: frozenset[str] = frozenset()
    rename: Callable[[str], str] = str
    sources: frozenset[str] = frozenset()

    def in_head(self, name: str) -> bool:
        """Whether a parameter is outside the backbone, in a model that has one."""
        start = self.prefix + "."
        has_backbone = any(known.startswith(start) for known in self.known)
        return has_backbone and name in self.known and not name.startswith(start)


def names_of(checkpoint: Checkpoint) -> Names:
    """The parameter names, from the model that the config describes; no weight is read."""
    model = skeleton(checkpoint, checkpoint.config)
    if model is None:
        return Names({key: key for key in checkpoint.home}, shared={})
    rename = renaming_of(model, transforms_of(model))
    known = frozenset(model.state_dict())
    parameter, converted = {}, {}
    for key in checkpoint.home:
        name, operations = rename(key)
        parameter[key] = key if operations or name not in known else name
        if operations:
            converted[name] = operations
    groups = _groups(model.all_tied_weights_keys)
    keys = {name: key for key, name in parameter.items()}
    shared: dict[str, str] = {}
    for group in groups:
        stored = [name for name in sorted(group) if name in keys]
        if stored:
            shared |= {name: keys[stored[0]] for name in sorted(group) if name not in keys}
    turned = frozenset(
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "Conv1D" or getattr(module, "is_transposed", False)
    )
    grouped = frozenset(name for name, module in model.named_modules() if getattr(module, "groups", 1) != 1)
    return Names(
        parameter,
        known,
        converted,
        groups,
        shared,
        model.base_model_prefix,
        turned,
        grouped,
        lambda key: rename(key)[0],
        frozenset(model.all_tied_weights_keys.values()),
    )


_ONE_AT_A_TIME = Lock()  # transformers builds its renamings on first use, which is not thread-safe


def names_at(folder: Path) -> Names:
    """The parameter names of the checkpoint in a folder; may be called from several threads, and remembers them."""
    with _ONE_AT_A_TIME:
        return _remembered(folder)


@cache
def _remembered(folder: Path) -> Names:
    return names_of(open_checkpoint(folder))


def skeleton(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Any:
    """Build the model of a config without weights; None if transformers does not know it."""
    return model_of(checkpoint.path, config)


def model_of(folder: Path, config: Mapping[str, Any]) -> Any:
    """Build the model of the config in a folder without weights; None if transformers does not know it."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    architecture = next(iter(config.get("architectures") or ()), "")
    kind = getattr(transformers, architecture, None)
    if kind is None or config.get("model_type") not in transformers.CONFIG_MAPPING:
        return None
    try:
        settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(_with_floats(config))
        with torch.device("meta"):
            return kind(settings)
    except (*UNBUILDABLE, StrictDataclassError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PimergeError(
            f"'{folder / CONFIG}' does not describe a {architecture}: {reason}",
            "download or save the checkpoint again",
        ) from error


def _with_floats(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose infinities and NaN, which transformers writes as objects, are numbers.

    >>> _with_floats({"limits": [0.0, {"__float__": "Infinity"}]})
    {'limits': [0.0, inf]}
    """

    def number(found: dict[str, Any]) -> Any:
        return float(found["__float__"]) if found.keys() == {"__float__"} else found

    decoded: dict[str, Any] = json.loads(json.dumps(config), object_hook=number)
    return decoded


def match_modules(names: Names, modules: Iterable[str]) -> dict[str, str]:
    """The key of each module's weight; for a weight that shares a stored tensor, its own name."""
    problems = Problems()
    found = {}
    for module in modules:
        with problems.collected():
            found[module] = _weight_of(names, module)
    taken: dict[str, str] = {}
    for module, key in found.items():
        if key in taken:
            problems.add(f"the modules '{taken[key]}' and '{module}' both map to '{key}'")
        taken.setdefault(key, module)
    problems.raise_any("the adapter does not fit the checkpoint")
    return found


def _weight_of(names: Names, module: str) -> str:
    """The key of a module's weight, or of the weight of the joint input projection of an attention."""
    module = module.replace(".base_layer.", ".")  # PEFT's name of a layer within an adapted one
    try:
        return match(names, f"{module}.weight", f"module '{module}'")
    except PimergeError:
        with suppress(PimergeError):
            return match(names, f"{module}.in_proj_weight", f"module '{module}'")
        if is_of_head(module) and not any(f".{module}." in f".{name}" for name in (*names.known, *names.parameter)):
            raise PimergeError(
                f"the checkpoint has no '{module}': the adapter updates a head that the checkpoint does not have",
                f"merge into the checkpoint that it was trained on, or leave the head out: --exclude '*{module}'",
            ) from None
        raise


def match(names: Names, name: str, what: str) -> str:
    """The key of a parameter: its name with or without the backbone's prefix, or, for a model that transformers does
    not know, the name with other separators.
    """
    index = _index(names)
    prefix = names.prefix + "."
    ways = [name, names.rename(name), prefix + name, name.removeprefix(prefix)]
    for way in ways:
        if way in index:
            return _only(index[way], what)
    if not names.known:
        loose = sorted({key for key in names.parameter if _loose(key) == _loose(name)})
        if loose:
            return _only(loose, what)
    if any(way in names.converted for way in ways) or any(way in names.known for way in ways):
        raise PimergeError(
            f"{what} has no tensor in the checkpoint: transformers makes its weight from other tensors",
            "leave the module out of the merge, or save the checkpoint with the parameter names of the loaded model",
        )
    raise PimergeError(f"the checkpoint has no weight for {what}", nearest(name, sorted(names.parameter)[:2000]))


def is_fan_in_first(names: Names, module: str) -> bool:
    """Whether a module stores its weight (d_in × d_out), in a model that transformers knows."""
    return _is_among(names, module, names.fan_in_first)


def is_grouped(names: Names, module: str) -> bool:
    """Whether a module is a convolution in groups, in a model that transformers knows."""
    return _is_among(names, module, names.grouped)


def _is_among(names: Names, module: str, known: frozenset[str]) -> bool:
    prefix = names.prefix + "."
    renamed = names.rename(f"{module}.weight").removesuffix(".weight")
    return any(way in known for way in (module, renamed, prefix + module, module.removeprefix(prefix)))


def align(own: Names, other: Names) -> dict[str, str]:
    """Key of another checkpoint → this one's key of the same parameter, regardless of the backbone's prefix."""
    index = {name: key for key, name in own.parameter.items()}
    index |= {key: key for key in own.parameter}
    prefixes = sorted({f"{names.prefix}." for names in (own, other) if names.prefix})
    found = {}
    for key, name in other.parameter.items():
        ways = [name, key, *(p + name for p in prefixes), *(name.removeprefix(p) for p in prefixes)]
        way = next((way for way in ways if way in index), None)
        if way is not None:
            found[key] = index[way]
    return found


def _index(names: Names) -> dict[str, list[str]]:
    """Parameter name or key on disk → the keys that it can refer to."""
    index: dict[str, list[str]] = {}
    for key, name in names.parameter.items():
        for way in {key, name}:
            index.setdefault(way, []).append(key)
    for name in names.shared or ():
        index.setdefault(name, []).append(name)
    return index


def _only(keys: list[str], what: str) -> str:
    if len(keys) > 1:
        raise PimergeError(f"{what} matches several tensors of the checkpoint: {', '.join(sorted(keys))}")
    return keys[0]


def _loose(name: str) -> str:
    """A name without the separators and prefixes that differ between programs.

    >>> names = ["model.diffusion_model.down.0.to_q.weight", "unet_down_0_to_q.weight", "lora_unet_down_0_to_q.weight"]
    >>> {_loose(name) for name in names}
    {'down_0_to_q_weight'}
    """
    return _DIFFUSION.sub("", name.replace(".", "_"))


def _groups(tied: Mapping[str, str]) -> tuple[frozenset[str], ...]:
    groups: dict[str, set[str]] = {}
    for name, source in tied.items():
        groups.setdefault(source, {source}).add(name)
    return tuple(frozenset(groups[source]) for source in sorted(groups))
