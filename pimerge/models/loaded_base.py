"""A base model in memory, for one task."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from pimerge.adapters.expert import Expert
from pimerge.checkpoints.architecture import hidden_size

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base model for one task.

    Attributes:
        model: the model in eval mode; all parameters are frozen.
        processor: tokenizer or image processor.
        head: names of the modules that a task trains besides its expert: modules outside the architecture's body, and
            modules without weights in the checkpoint; empty if the base answers in text.
        has_own_head: whether the checkpoint has a head for exactly these labels, or the base answers in text.
        randomly_initialised: names of the head's parameters that the checkpoint lacks.
        own_labels: classes of the checkpoint's own head, in its order; empty if it has no head of this size.
    """

    model: nn.Module
    processor: Any
    head: tuple[str, ...]
    has_own_head: bool
    randomly_initialised: frozenset[str] = frozenset()
    own_labels: tuple[str, ...] = ()

    @property
    def config(self) -> Any:
        """The model's transformers config."""
        return self.model.config

    @property
    def width(self) -> int | None:
        """The hidden size; None if the config has none."""
        return hidden_size(self.model)

    def other_order(self, labels: Sequence[str]) -> str:
        """What to say if the checkpoint's head has these labels in another order; empty otherwise."""
        if self.has_own_head or {name.lower() for name in self.own_labels} != {name.lower() for name in labels}:
            return ""
        return (
            f"the base's head answers {', '.join(self.own_labels)}, in this order; the task lists {', '.join(labels)}"
        )

    def config_for(self, experts: Sequence[Expert]) -> Any:
        """The config, with fewer positions if experts put vectors before the text."""
        taken = max((expert.positions for expert in experts), default=0)
        positions = getattr(self.config, "max_position_embeddings", None)
        if not taken or positions is None:
            return self.config
        found = copy(self.config)
        found.max_position_embeddings = positions - taken
        return found

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters that a task trains besides its expert."""
        return [parameter for name, parameter in self.model.named_parameters() if in_head(name, self.head)]

    def head_tensors(self) -> dict[str, Tensor]:
        """The head's parameters and buffers, by their names in the base model."""
        state = self.model.state_dict()
        return {name: value for name, value in state.items() if in_head(name, self.head)}


def most_virtual_tokens(experts: Sequence[Expert]) -> int:
    """The largest number of vectors that an expert puts before a text; if it is not 0, batches must not be padded.

    A causal model searches the tokens for the last one that is not padding, and vectors shift its position.
    """
    return max((expert.virtual_tokens for expert in experts), default=0)


def in_head(name: str, head: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to one of the head's modules.

    >>> in_head("classifier.weight", ("classifier",)), in_head("vit.layers.0.weight", ("classifier",))
    (True, False)
    """
    return any(name.startswith(module + ".") for module in head)
