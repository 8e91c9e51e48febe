"""Callbacks of transformers' Trainer; their classes are made on demand, so that importing this is fast."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pimerge.core.progress import Track
from pimerge.tuning.ema import EmaModel

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments


def stop_after(epochs: int) -> TrainerCallback:
    """A callback that ends the training after some epochs."""
    from transformers import TrainerCallback

    class Stopping(TrainerCallback):  # type: ignore[misc]
        def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = control.should_training_stop or round(state.epoch) >= epochs

    return Stopping()


def average_parameters(model: EmaModel) -> TrainerCallback:
    """A callback that adds every step to a moving average."""
    from transformers import TrainerCallback

    class Averaging(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
            model.update(state.global_step)

    return Averaging()


def report_progress(track: Track, stack: ExitStack) -> TrainerCallback:
    """A callback that reports steps and the last losses."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
            self.advance = stack.enter_context(track("training", state.max_steps, "steps"))
            self.advance(state.global_step)
            self.loss = ""

        def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
            self.advance(1, self.loss)

        def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.loss = f"loss {float(logs['loss']):.3f}"
            if logs and "eval_loss" in logs:
                self.loss = f"{self.loss.partition(',')[0]}, held out {float(logs['eval_loss']):.3f}"

    return Progress()
