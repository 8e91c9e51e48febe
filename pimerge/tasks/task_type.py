"""The family of task types. A type turns rows into batches, and a model's output into probabilities of answers.

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
    """Reads the inputs of a model's head."""

    def __call__(
        self,
        model: nn.Module,
        reading: Mapping[str, nn.Module],
        examples: Examples,
        indices: Sequence[int],
        answers: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the input vectors of the head (n × d), and the logits of the classes (n × classes) if ``answers``.

        Args:
            reading: candidate modules; the first of them to run reads the vectors.
        """


@dataclass(frozen=True, kw_only=True, eq=False)  # each is one object, and hashable
class TaskType(Strategy):
    """A type of task.

    Attributes:
        auto_model: transformers' class that loads a base; or a pair, the second for encoder-decoders. See
            :meth:`auto_model_for`.
        peft_task: PEFT's task type, or such a pair; None if PEFT has none.
        trains_head: whether the task trains its own head beside the expert; otherwise the base's head is used.
        columns: role → whether the data must have a column for it. ``label`` is the class of a row, required if the
            task has labels; ``labels`` are the classes of its words.
        texts: roles whose columns hold texts, which are read as they are.
        usual_columns: role → column names from which the type of rows in memory is inferred.
        fields: fields of ``task.json`` besides those of every type.
        class_name_role: role of the column that a class name can fill as one more example of its class.
        answers: forms of answer besides a class: ``choices`` of a row, ``texts``.
        check: raises an error for fields of ``task.json`` that do not fit.
        load_processor: source and revision of a base → its tokenizer or processor.
        encode: rows → examples.
        nll: model and batch → −log p(y|x) of each example, summed over its target tokens, (batch).
        draw: samples classes of examples (or of their words) from the model's distribution, by inverting its
            distribution function at uniform numbers (n).
        score: scores the model's answers to some examples.
        read: reads the inputs of the model's head for some examples.
    """

    auto_model: str | tuple[str, str]
    peft_task: str | tuple[str, str] | None
    trains_head: bool
    columns: Mapping[str, bool]
    texts: tuple[str, ...] = ()
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
        """The class of transformers that loads a base with this config."""
        return _for_base(self.auto_model, config)

    def peft_task_for(self, config: Any) -> str | None:
        """PEFT's task type for a base with this config."""
        return None if self.peft_task is None else _for_base(self.peft_task, config)


TASK_TYPES = Family("pimerge.tasks.types", "task type", "TASK_TYPE", TaskType)


def _for_base(values: str | tuple[str, str], config: Any) -> str:
    """Select the value for a base: of a pair, the second is for encoder-decoders.

    >>> from types import SimpleNamespace
    >>> _for_base(("causal", "encoder-decoder"), SimpleNamespace(is_encoder_decoder=False))
    'causal'
    """
    return values[bool(config.is_encoder_decoder)] if isinstance(values, tuple) else values
