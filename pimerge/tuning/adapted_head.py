"""Experts that adapt modules on top of the backbone, such as a pooler: these are mixed, not trained as a head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from pimerge.adapters.expert import Expert
from pimerge.core.errors import Problems
from pimerge.models.loaded_base import LoadedBase, in_head


def without_adapted(loaded: LoadedBase, experts: Sequence[Expert]) -> LoadedBase:
    """The base with a head of those modules alone that no expert adapts.

    A head whose weights are newly initialised cannot be adapted: the experts were trained on other weights.
    """
    adapted = {
        name: expert
        for expert in reversed(experts)
        for name in expert.parts
        if not expert.strategy.before_text and in_head(f"{name}.", loaded.head)
    }
    if not adapted:
        return loaded
    head = tuple(name for each in loaded.head for name in _rest(loaded.model.get_submodule(each), each, set(adapted)))
    problems = Problems()
    for name in sorted({key.rpartition(".")[0] for key in loaded.randomly_initialised if not in_head(key, head)}):
        owner = next((expert for module, expert in adapted.items() if f"{name}.".startswith(f"{module}.")), None)
        if owner is not None:
            problems.add(
                f"'{owner.name}' adapts '{name}', a part of the head for which the base has no weights for this task",
                "pass --base with the checkpoint that the expert was trained on, or leave the module out: "
                f"pimerge merge {owner.path} --exclude '*{name}'",
            )
    problems.raise_any("these experts adapt a head that the base does not have")
    return replace(loaded, head=head)


def _rest(module: nn.Module, name: str, adapted: set[str]) -> Iterator[str]:
    """The names of the largest modules without an adapted one."""
    if name in adapted:
        return
    if not any(f"{each}.".startswith(f"{name}.") for each in adapted):
        yield name
        return
    for child_name, child in module.named_children():
        if any(True for _ in child.parameters()):
            yield from _rest(child, f"{name}.{child_name}", adapted)
