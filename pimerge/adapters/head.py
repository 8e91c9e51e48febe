"""Choose the task head of a merged expert: the target's, the mean, or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pimerge.adapters.expert import Expert
from pimerge.adapters.expert_files import TASK
from pimerge.adapters.keys import TOKEN_ROWS, is_of_model, is_saved
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.patterns import is_within
from pimerge.tasks.task import Task, open_task

if TYPE_CHECKING:
    from torch import Tensor


HEAD_POLICIES = ("target", "average", "none")


@dataclass(frozen=True)
class Head:
    """A task head to write beside the factors.

    Attributes:
        tensors: parameter name in the base model → tensor.
        modules: the ``modules_to_save`` that they belong to.
        task: the task whose labels the head predicts, or that the base answers in text; None if it is unknown.
        token_indices: the ``trainable_token_indices`` of the rows of embeddings in it; None without such rows.
        biases: the names in it of trained biases of the base (``bias="all"``).
        remarks: sentences on how its embeddings and biases were merged.
    """

    tensors: Mapping[str, Tensor]
    modules: Sequence[str]
    task: Task | None
    token_indices: Any = None
    biases: frozenset[str] = frozenset()
    remarks: tuple[str, ...] = ()

    @property
    def token_rows(self) -> dict[str, tuple[int, ...]]:
        """Name in :attr:`tensors` → the tokens whose rows the tensor holds."""
        return rows_of(self.tensors, self.token_indices)


def rows_of(names: Iterable[str], token_indices: Any) -> dict[str, tuple[int, ...]]:
    """Name → tokens, for the names of trained rows of embeddings among those of a head.

    Args:
        token_indices: the field ``trainable_token_indices`` of the config.

    >>> rows_of(["wte.token_adapter.trainable_tokens_delta", "score.weight"], {"wte": [5, 9]})
    {'wte.token_adapter.trainable_tokens_delta': (5, 9)}
    """
    found = {}
    for name in names:
        module = name.removesuffix(TOKEN_ROWS)
        if module != name:
            stated = token_indices
            if isinstance(stated, dict):
                stated = next((rows for layer, rows in stated.items() if f".{module}".endswith(f".{layer}")), [])
            found[name] = tuple(stated or ())
    return found


NO_HEAD = Head({}, (), None)


def choose_head(policy: str, experts: Sequence[Expert], target: Expert | None) -> Head:
    """Choose the task head of a merged expert; with the target's comes all that the target holds of the base.

    Args:
        policy: ``target`` (the target's own), ``average`` (the mean, if all have the same labels) or ``none``.
        target: the target's expert; None if it is unknown.
    """
    import torch

    if policy not in HEAD_POLICIES:
        raise PimergeError(f"--head is '{policy}'", f"expected {', '.join(HEAD_POLICIES)}")
    task = None if target is None or target.head or policy == "none" else task_of(target)
    if task is not None and not task.type.trains_head:
        return Head({}, (), task)
    if policy == "none" or not any(expert.head for expert in experts):
        return NO_HEAD
    if policy == "target" and target is not None:
        return _own_head(target)
    if not any(_task_head(expert) for expert in experts):
        return NO_HEAD
    if policy == "target":
        raise PimergeError(
            "the experts have heads, but the target is unknown",
            "pass --target NAME_OR_FOLDER, --head average (if all have the same labels) or --head none",
        )
    tasks = {expert.name: task for expert in experts if (task := task_of(expert))}
    unknown = [expert.name for expert in experts if expert.name not in tasks]
    if unknown:
        raise PimergeError(
            f"--head average needs to know that all heads have the same labels in the same order, but "
            f"{', '.join(map(repr, unknown))} {'has' if len(unknown) == 1 else 'have'} no task.json",
            "write a task.json with the labels into each folder; or take one expert's head (--head target --target "
            "EXPERT) or none (--head none)",
        )
    problems = Problems()
    first = experts[0]
    labels = tasks[first.name]
    for expert in experts:
        own = tasks[expert.name]
        if own.labels != labels.labels:
            problems.add(
                f"the head of '{expert.name}' has the labels {own.labels}, the head of '{first.name}' has "
                f"{labels.labels}",
                "take one expert's head (--head target --target EXPERT) or none (--head none)",
            )
        elif _shapes(expert) != _shapes(first):
            problems.add(f"the head of '{expert.name}' has other tensors than the head of '{first.name}'")
    problems.raise_any("the heads cannot be averaged")
    mean = {
        name: torch.stack([expert.tensor(expert.head[name]).double() for expert in experts])
        .mean(0)
        .to(first.tensor(key).dtype)
        for name, key in _task_head(first).items()
    }
    return Head(mean, [name for name in head_modules(first) if any(is_saved(each, [name]) for each in mean)], labels)


def _own_head(expert: Expert) -> Head:
    has_rows = any(name.endswith(TOKEN_ROWS) for name in expert.head)
    indices = expert.config.get("trainable_token_indices") if has_rows else None
    return Head(expert.head_tensors(), head_modules(expert), task_of(expert), indices)


def task_of(expert: Expert) -> Task | None:
    """The task in an expert's folder; None without a task.json."""
    return open_task(expert.folder) if (expert.folder / TASK).is_file() else None


def head_modules(expert: Expert) -> list[str]:
    """The ``modules_to_save`` of an expert that its head has."""
    saved: list[str] = expert.config.get("modules_to_save") or []
    found = [name for name in saved if any(is_saved(parameter, [name]) for parameter in expert.head)]
    if expert.config.get("ensure_weight_tying"):  # PEFT saves the layers that share a saved module's weight as well
        modules = (parameter.rpartition(".")[0] for parameter in expert.head if not is_saved(parameter, saved))
        found += sorted({module for module in modules if not module.endswith(".base_layer")})
    return found


def _task_head(expert: Expert) -> dict[str, str]:
    """The part of an expert's head that belongs to its task."""
    saved = expert.config.get("modules_to_save") or []
    return {name: key for name, key in expert.head.items() if not is_of_model(name, saved)}


def _shapes(expert: Expert) -> dict[str, tuple[int, ...]]:
    return {name: expert.file.entries[key].shape for name, key in _task_head(expert).items()}


def refuse_updates_of_head(experts: Sequence[Expert], modules: Sequence[str], head: Head) -> None:
    """Refuse an update of a module that the head replaces: PEFT adapts no module in ``modules_to_save``.

    Args:
        modules: names of the modules of the merged update.
    """
    problems = Problems()
    for saved in head.modules:
        updated = [name for name in modules if is_within(saved, name)]
        owner = next((expert.name for expert in experts if set(updated) & expert.modules.keys()), "")
        if updated:
            problems.add(
                f"'{owner}' updates '{updated[0]}' of the base, but the head of the result replaces '{saved}'",
                f"pass --head none for the base's own head, or leave the update out: --exclude '*{updated[0]}'",
            )
    problems.raise_any("the updates do not fit the head")
