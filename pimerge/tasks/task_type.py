"""Types of task: the family. A type turns rows into batches, and a model's output into the probability of an answer.

Layout: logits are (batch × classes), or (batch × tokens × vocabulary) for types that answer in text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pimerge.core.plugins import Family, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

    from pimerge.tasks.examples import Batch, Examples, Rows, Scored
    from pimerge.tasks.schema import TaskFile


class Reading(Protocol):
    """Reads what a model's head takes in."""

    def __call__(
        self,
        model: nn.Module,
        reading: Mapping[str, nn.Module],
        examples: Examples,
        indices: Sequence[int],
        answers: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The vectors that the head reads, (n × d), and the logits of the classes, (n × classes), if ``answers``.

        Args:
            reading: the modules of which the first to run takes the vectors in.
        """


@dataclass(frozen=True, kw_only=True, eq=False)  # each is one object, and hashable
class TaskType(Strategy):
    """A type of task.

    Attributes:
        auto_model: the class of transformers that loads a base for it; or two, the second for a base with an encoder
            and a decoder. See :meth:`auto_model_for`.
        peft_task: PEFT's name for it, or two likewise; None where PEFT has none.
        trains_head: whether the task has a head of its own beside the expert; else the base's own head answers.
        columns: role → whether the data must have a column for it. ``label`` is the class of a row and is needed where
            there are labels; ``labels`` are the classes of its words.
        usual_columns: role → names by which rows in memory are recognised as being of this type.
        fields: the fields of ``task.json`` that it has besides those of every type.
        class_name_role: the role of a column in which the name of a class could stand, as one more example of it.
        answers: forms of answer besides a class: ``choices`` of a row, ``texts``.
        check: raises an error for fields of ``task.json`` that do not fit.
        load_processor: source and revision of a base → its tokenizer or processor.
        encode: rows → examples.
        nll: −log p(y|x) of each example of a batch, summed over its target tokens, (batch).
        draw: the examples' classes, or those of their words, drawn from the model's own distribution where its
            distribution function passes a number (n).
        score: what the model answers to some examples.
        read: what its head reads of some examples.
    """

    auto_model: str | tuple[str, str]
    peft_task: str | tuple[str, str] | None
    trains_head: bool
    columns: Mapping[str, bool]
    usual_columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    fields: frozenset[str]
    class_name_role: str = ""
    answers: tuple[str, ...] = ()
    check: Callable[[TaskFile], None] = lambda file: None
    load_processor: Callable[[str, str | None], Any]
    encode: Callable[[Rows, TaskFile, Any, PreTrainedConfig], Examples]
    nll: Callable[[nn.Module, Batch], Tensor]
    draw: Callable[[nn.Module, Examples, Sequence[int], Tensor], Sequence[Any]]
    score: Callable[[nn.Module, Examples, Sequence[int]], Scored]
    read: Reading

    def answer_forms(self, file: TaskFile) -> list[str]:
        """The forms of answer to a task, its main one first: ``classes``, ``choices`` or ``texts``."""
        return [*(["classes"] if self.trains_head or file.labels else []), *self.answers]

    def auto_model_for(self, config: Any) -> str:
        """The class of transformers that loads a base of this config."""
        return _for_base(self.auto_model, config)

    def peft_task_for(self, config: Any) -> str | None:
        """PEFT's name for the task with a base of this config."""
        return None if self.peft_task is None else _for_base(self.peft_task, config)


TASK_TYPES = Family("pimerge.tasks.types", "task type", "TASK_TYPE", TaskType)


def _for_base(values: str | tuple[str, str], config: Any) -> str:
    """One value for every base, or the second of two for an encoder-decoder.

    >>> from types import SimpleNamespace
    >>> _for_base(("causal", "encoder-decoder"), SimpleNamespace(is_encoder_decoder=False))
    'causal'
    """
    return values[bool(config.is_encoder_decoder)] if isinstance(values, tuple) else values
