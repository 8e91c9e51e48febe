"""An exponential moving average of the trained parameters, used whenever the model is evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

PREFIX = "average."


class EmaModel(nn.Module):
    """A model whose eval mode uses the average m ← β m + (1 − β) p of its trained parameters p.

    At step t, β is at most (1 + t) / (10 + t), so early averages are not dominated by the start. The averages are part
    of the state dict, so an interrupted run continues with them.

    Args:
        decay: β.

    >>> model = EmaModel(nn.Linear(1, 1, bias=False), decay=0.5)
    >>> _ = nn.init.ones_(model.model.weight)
    >>> model.reset()
    >>> with torch.no_grad(): _ = model.model.weight.fill_(2.0)
    >>> model.update(step=100)
    >>> model.train()(torch.ones(1, 1)).item(), model.eval()(torch.ones(1, 1)).item()
    (2.0, 1.5)
    """

    accepts_loss_kwargs = False  # the Trainer reads this attribute and the next
    _keys_to_ignore_on_save = None

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.model, self.decay = model, decay
        self.config = getattr(model, "config", None)
        self.in_place = False  # whether the averages currently replace the parameters
        self.reset()

    def reset(self) -> None:
        """Restart the averages at the current parameters."""
        self._averages = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add a step of training to the averages."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(self.model.named_parameters())
        for name, average in self._averages.items():
            average.lerp_(parameters[name], 1 - decay)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> EmaModel:
        """Use the averages in place of the parameters in eval mode."""
        super().train(mode)
        if self.in_place == mode:
            self._exchange()
        return self

    @torch.no_grad()
    def _exchange(self) -> None:
        parameters = dict(self.model.named_parameters())
        for name, average in self._averages.items():
            parameters[name].data, self._averages[name] = average, parameters[name].data
        self.in_place = not self.in_place

    @contextmanager
    def _parameters_in_place(self) -> Iterator[None]:
        exchanged = self.in_place
        if exchanged:
            self._exchange()
        try:
            yield
        finally:
            if exchanged:
                self._exchange()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's state, and the averages."""
        with self._parameters_in_place():
            state = {name: value.clone() for name, value in self.model.state_dict().items()}
        averages = dict(self.model.named_parameters()) if self.in_place else self._averages
        return state | {PREFIX + name: averages[name].detach().clone() for name in self._averages}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Restore what :meth:`state_dict` returned."""
        with self._parameters_in_place():
            for name, average in self._averages.items():
                average.copy_(state_dict[PREFIX + name])
            plain = {name: value for name, value in state_dict.items() if not name.startswith(PREFIX)}
            return self.model.load_state_dict(plain, strict=False)


def average_parameters(model: EmaModel) -> TrainerCallback:
    """Make a Trainer callback that adds every step to the moving average."""
    from transformers import TrainerCallback

    class Averaging(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
            model.update(state.global_step)

    return Averaging()
