"""Check an adapter that was written, before it is put in place, as PEFT would read it.

The config and the header of the tensors are read again, without the layout that they were written from: each factor has
its partner, ranks are those of the config, ``target_modules`` selects exactly the modules in the file, the head is the
one that the task type expects, and names and shapes are those of the base if it is on this machine. Neither peft nor
transformers is imported for it, unless the base's files name none of the modules.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.keys import OF_TOKENS, is_saved
from pimerge.adapters.lora_fields import is_fused
from pimerge.adapters.lora_module import LoraModule
from pimerge.adapters.model_class import lacks_head
from pimerge.checkpoints.base import Base
from pimerge.checkpoints.base_shapes import base_modules, base_shapes
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.patterns import is_within, matches

BUG = "this is a bug of pimerge: please report it with the command and the experts' configs"


def check_adapter(folder: Path, base: Base) -> None:
    """Check a folder that PEFT has to load into a base; all problems are raised at once."""
    problems, faults = Problems(), Problems()
    with faults.collected():
        expert = open_expert(folder, base.reference if base.folder is not None else None, convert=True)
    for fault in faults.found:
        problems.add(fault.message, BUG)
    if not faults.found:
        _check_selection(expert, base_modules(base), problems)
        _check_head(expert, problems)
        _check_biases(expert, problems)
        if not problems.found:
            _check_shapes(expert, base, problems)
    if problems.found:
        raise PimergeError("the result was not written, since it would not load", problems=problems.found)


def selects(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT adapts a module of the base, by the fields of a config.

    >>> selects({"target_modules": ["q"]}, "h.0.q"), selects({"target_modules": "h.*"}, "x.h.0")
    (True, False)
    >>> selects({"target_modules": ["score"], "modules_to_save": ["score"]}, "score")
    False
    """
    if _matches(config.get("exclude_modules"), name):
        return False
    if any(is_within(saved, name) for saved in config.get("modules_to_save") or ()):
        return False
    targets = config.get("target_modules")
    return targets is None or targets == "all-linear" or _matches(targets, name)


def _matches(targets: Any, name: str) -> bool:
    """Whether a name or its ending is in a list, or the whole name matches a regular expression."""
    if isinstance(targets, str):
        return matches(targets, name)
    found = frozenset(targets or ())
    return any(ending in found for ending in _endings(name))


def _endings(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _check_selection(expert: Expert, known: set[str], problems: Problems) -> None:
    """Compare the modules that the config selects with those in the file."""
    config, kind, targets = expert.config, expert.strategy, expert.config.get("target_modules")
    own = {name for name, module in expert.modules.items() if module.parameter is None}
    places = set() if kind.before_text else own | expert.tensor_sets.keys()
    config = {**config, "target_modules": targets if isinstance(targets, str) else frozenset(targets or ()) or None}
    selected = {name for name in places if selects(config, name)}
    tied = {name for name in expert.tensor_sets if expert.tensor_sets[name].has_rows} if selected else set()
    for name in sorted(places - tied):  # with an embedding, PEFT trains the rows of the layers that are tied to it
        if name not in selected:
            problems.add(f"the config does not select '{name}', which the file holds", BUG)
    if kind.stores_factors and own & known and targets:
        for name in sorted(known - own):
            if selects(config, name):
                problems.add(f"the config selects '{name}' of the base, which the file does not hold", BUG)


def _check_head(expert: Expert, problems: Problems) -> None:
    """Check that the head is the one that the config announces."""
    for name in expert.config.get("modules_to_save") or ():
        if not any(is_saved(parameter, [name]) for parameter in expert.head):
            problems.add(f"modules_to_save has '{name}', which the file does not hold", BUG)
    task_type = expert.config.get("task_type")
    if lacks_head(task_type, expert.head):
        problems.add(f"PEFT expects a head for the task type {task_type}, and the file holds none", BUG)


def _check_biases(expert: Expert, problems: Problems) -> None:
    """Check that every module or none has a bias, by ``lora_bias``."""
    expected, modules = bool(expert.config.get("lora_bias")), expert.modules if expert.strategy.stores_factors else {}
    for name, module in modules.items():
        if (module.bias is not None) != expected:
            problems.add(f"'{name}' has {'no' if expected else 'a'} bias, but lora_bias is {expected}", BUG)


def _check_shapes(expert: Expert, base: Base, problems: Problems) -> None:
    """Compare the updates with the base's weights of the same names."""
    shapes = {key.removesuffix(".weight"): shape for key, shape in base_shapes(base).items() if key.endswith(".weight")}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    vocabulary = {shape[0] for name, shape in matrices.items() if name.rpartition(".")[2] in OF_TOKENS}
    modules = {name: module for name, module in expert.modules.items() if module.parameter is None}
    found = {name: matrices.get(_on_disk(name, matrices)) for name in modules if not is_fused(name)}
    for name, shape in found.items():
        if shape is not None and not _fits(modules[name], shape, vocabulary):
            problems.add(
                f"module '{name}': ΔW is {modules[name].d_out} × {modules[name].d_in}, but the weight of the base "
                f"'{base.name}' is {shape}",
                "the experts were trained on another base: pass their own with --base",
            )
    if found and shapes and not any(_on_disk(name, shapes) for name in found):
        _check_names(list(found), base, problems)


def _on_disk(name: str, known: Mapping[str, Any]) -> str:
    """The name of a module in the base's files, which may lack the first parts of it; empty if there is none."""
    return next((ending for ending in _endings(name) if ending in known and ("." in ending or ending == name)), "")


def _fits(module: LoraModule, shape: tuple[int, ...], vocabulary: Container[int]) -> bool:
    """Whether an update has the shape of a weight, however it is stored and however many tokens it has."""
    own, stored = {module.d_out, module.d_in}, {shape[0], math.prod(shape[1:])}
    return own == stored or (shape[0] in vocabulary and shape[1] in own)


def _check_names(names: Sequence[str], base: Base, problems: Problems) -> None:
    """Check that today's model of the base has one of the modules, none of which the base's files name."""
    from pimerge.checkpoints.checkpoint import open_checkpoint
    from pimerge.checkpoints.key_mapping import names_of  # imports transformers

    assert base.folder is not None
    found = names_of(open_checkpoint(base.folder))
    known = {parameter.rpartition(".")[0] for parameter in found.known}
    ways = [way for name in names for way in (name, found.rename(f"{name}.weight").removesuffix(".weight"))]
    if known and not any(_on_disk(way, dict.fromkeys(known)) or f"{found.prefix}.{way}" in known for way in ways):
        problems.add(
            f"the model of the base '{base.name}' has none of the adapted modules, such as '{names[0]}'",
            "the experts were trained on another base: pass their own with --base",
        )
