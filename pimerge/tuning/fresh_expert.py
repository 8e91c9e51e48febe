"""Untrained experts of kinds other than LoRA, which PEFT puts into a base by its own defaults."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from pimerge.adapters.base_fit import check_fits
from pimerge.adapters.computed_module import as_tensor_sets
from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.kind import KINDS
from pimerge.checkpoints.architecture import inside
from pimerge.checkpoints.base import Base
from pimerge.core.errors import PimergeError
from pimerge.models.injection import modules_restored
from pimerge.models.loaded_base import LoadedBase
from pimerge.tasks.task import Task

_OTHER_KIND = "take another --kind"


@contextmanager
def fresh_expert(
    kind: str, loaded: LoadedBase, base: Base, task: Task, size: int | None = None, modules: Sequence[str] | None = None
) -> Iterator[Expert]:
    """Make a fresh expert of a kind in a temporary folder, deleted afterwards; the base is unchanged afterwards.

    Args:
        kind: one other than LoRA; those that have a ΔW come as the tensors that are trained.
        size: numbers in the middle of a bottleneck, or vectors of a prefix or prompt; None for the usual.
        modules: names or name endings; None for those that PEFT adapts in this architecture.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model

    from pimerge import peft_methods  # noqa: F401  PEFT has to know every kind

    strategy = KINDS.load(kind)
    if strategy.fresh_fields is None:
        raise PimergeError(f"no fresh expert of kind {kind} can be made", _OTHER_KIND)
    if strategy.before_text and task.type.peft_task is None:
        raise PimergeError(f"a {kind} goes before a text, and {type(loaded.model).__name__} takes none", _OTHER_KIND)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[strategy.peft_type]
    fields = {
        "task_type": task.type.peft_task_for(loaded.config),
        **({"exclude_modules": inside(loaded.head)} if hasattr(config_class, "exclude_modules") else {}),
        **strategy.usual_places(loaded.model),
        **strategy.fresh_fields(size, modules),
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            with modules_restored(loaded.model):
                get_peft_model(loaded.model, config_class(**fields)).save_pretrained(
                    folder, save_embedding_layers=False
                )
        except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise PimergeError(
                f"a fresh expert of kind {kind} cannot be put into {type(loaded.model).__name__}: {reason}",
                "name layers with --modules, or use another --kind",
            ) from error
        expert = open_expert(folder, base.reference)
        if expert.is_computed:
            expert = replace(expert, tensor_sets=as_tensor_sets(expert.modules), modules={})
        try:
            check_fits(expert, loaded.model, head=False)
        except PimergeError as error:
            reason = "; ".join(problem.message for problem in error.problems)
            raise PimergeError(
                f"a fresh expert of kind {kind} has no place in {type(loaded.model).__name__}: {reason}", _OTHER_KIND
            ) from error
        yield expert
