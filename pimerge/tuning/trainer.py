"""Train a mixture on a target's examples with transformers' Trainer.

The Trainer brings mixed precision, schedules, early stopping, several GPUs and checkpoints. A run that was killed
continues from its last complete checkpoint.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from pimerge.core.errors import PimergeError
from pimerge.core.files import disk_errors
from pimerge.core.progress import Note, Track, silent, unheard
from pimerge.models.loaded_base import LoadedBase
from pimerge.tasks.examples import Examples
from pimerge.tuning.ema import EmaModel
from pimerge.tuning.loss import mean_loss
from pimerge.tuning.mixture import Mixture
from pimerge.tuning.optimizer import optimizer_of
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.resume import last_complete_checkpoint, train_from
from pimerge.tuning.sam import sharpness_aware
from pimerge.tuning.trainer_callbacks import average_parameters, report_progress, stop_after

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

LOWER = "pass a lower --lr or --weights-lr"
_ROOM_FOR_CHECKPOINTS = 64 * 2**20


class Diverged(PimergeError):
    """A training that ended in NaN or Inf."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A model to train, on which examples, and how.

    Attributes:
        loaded: the base that holds the mixture.
        model: the module that answers: the base's own, or one around it such as PEFT's, which adds a prompt.
        mixture: the weights.
        examples: what is trained on; labels may be distributions over the classes, (C) of each, in place of a class.
        held_out: what early stopping looks at.
        folder: of the checkpoints; training continues from a complete one in it.
        precision: float32, or bfloat16 for mixed precision.
    """

    loaded: LoadedBase
    model: nn.Module
    mixture: Mixture
    examples: Examples
    held_out: Examples | None
    folder: Path
    options: TrainingOptions
    precision: torch.dtype
    track: Track = silent
    note: Note = unheard


@dataclass(frozen=True)
class TrainingOutcome:
    """How a training went.

    Attributes:
        epochs: passes over the training examples until it ended.
        train_loss: of the last pass; None if nothing trained.
        held_out_loss: the lowest one; None without held-out examples.
        held_out_losses: after each pass; empty where several trainings made the result.
        trained_parameters: how many numbers trained.
        writes: whether this process writes the result; under ``accelerate launch`` one of several does.
    """

    epochs: float
    train_loss: float | None
    held_out_loss: float | None
    held_out_losses: tuple[float, ...]
    trained_parameters: int
    writes: bool


def untrained() -> TrainingOutcome:
    """The outcome where nothing trains."""
    return TrainingOutcome(0, None, None, (), 0, writes=os.environ.get("RANK", "0") == "0")


def train(run: TrainingRun) -> TrainingOutcome:
    """Train the head and whatever requires gradients; the state with the lowest held-out loss stays in the model."""
    model = _trainable(run)
    if run.options.ema is not None:
        model = EmaModel(model, run.options.ema)
    checkpoint = last_complete_checkpoint(run.folder)
    if checkpoint is not None:
        run.note(f"resuming from {checkpoint.name} of an interrupted run")
    with ExitStack() as stack, _training_errors(run.folder):
        trainer = _trainer(run, model, stack)
        train_from(trainer, checkpoint)
        trainer.accelerator.wait_for_everyone()  # one of them clears the folder away
    model.eval()
    train_loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    try:
        _require_converged(model, train_loss, trainer.state.best_metric if run.held_out else 0.0)
    except PimergeError:
        shutil.rmtree(run.folder, ignore_errors=True)  # no checkpoint in it is worth continuing from
        raise
    losses = tuple(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    if not all(map(math.isfinite, losses)):
        run.note(f"the training diverged; the last finite state is taken: {LOWER}")
    return TrainingOutcome(
        epochs=trainer.state.epoch,
        train_loss=train_loss,
        held_out_loss=trainer.state.best_metric,
        held_out_losses=losses,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        writes=trainer.is_world_process_zero(),
    )


def _trainable(run: TrainingRun) -> nn.Module:
    """The model as the Trainer sees it: its state is what trains, so checkpoints are small."""
    for parameter in run.loaded.head_parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)

    class Trainable(nn.Module):
        accepts_loss_kwargs = False
        _keys_to_ignore_on_save = None

        def __init__(self) -> None:
            super().__init__()
            self.model, self.mixture, self.config = run.model, run.mixture, run.loaded.config

        def forward(self, **batch: Any) -> Any:
            return self.model(**batch)

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k in trained}

    return Trainable()


def _trainer(run: TrainingRun, model: nn.Module, stack: ExitStack) -> Trainer:
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer

    options = run.options
    callbacks: list[Any] = [report_progress(run.track, stack)]
    if run.held_out:
        callbacks.append(EarlyStoppingCallback(options.patience))
    if options.stop_after is not None:
        callbacks.append(stop_after(options.stop_after))
    if isinstance(model, EmaModel):
        callbacks.append(average_parameters(model))
    trainer = (sharpness_aware(Trainer, options.sam) if options.sam else Trainer)(
        model=model,
        args=_arguments(run),
        train_dataset=run.examples,
        eval_dataset=run.held_out,
        data_collator=run.examples.collate,
        callbacks=callbacks,
        compute_loss_func=partial(mean_loss, label_smoothing=options.label_smoothing),
        optimizers=(optimizer_of(model, run.mixture, options), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(run: TrainingRun) -> TrainingArguments:
    from transformers import TrainingArguments

    options, evaluated = run.options, run.held_out is not None
    device = run.mixture.logits.device.type
    return TrainingArguments(
        output_dir=str(run.folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        # without a head each token has logits over the whole vocabulary
        per_device_eval_batch_size=max(64, options.batch_size) if run.loaded.head else options.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup,  # below 1 it is a share of all steps
        max_grad_norm=options.max_grad_norm,
        average_tokens_across_devices=False,  # the loss is a mean
        bf16=run.precision == torch.bfloat16,
        use_cpu=device == "cpu",
        seed=options.seed,
        data_seed=options.seed,
        eval_strategy="epoch" if evaluated else "no",
        save_strategy="epoch",
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,  # a resumed run keeps its patience
        load_best_model_at_end=evaluated,
        metric_for_best_model="eval_loss" if evaluated else None,
        greater_is_better=False if evaluated else None,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # a loss of NaN is reported as such
        log_level_replica="passive",  # as the first process's
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device == "cuda",
    )


@contextmanager
def _training_errors(run: Path) -> Iterator[None]:
    """Report a disk that is full while checkpoints are written, in whatever words the libraries put it."""
    try:
        with disk_errors(run):
            yield
    except (RuntimeError, SafetensorError) as error:
        if shutil.disk_usage(run.parent).free > _ROOM_FOR_CHECKPOINTS:
            raise
        raise PimergeError(
            f"cannot write checkpoints to '{run}': the disk is full", "free some space or choose another --output"
        ) from error


def _require_converged(model: nn.Module, *losses: float | None) -> None:
    """Check what was trained, and its losses; None is one that was never a number."""
    trained = all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)
    if not trained or not all(loss is not None and math.isfinite(loss) for loss in losses):
        what = "the loss" if trained else "what was trained"
        raise Diverged(f"the training diverged: NaN or Inf in {what}", LOWER)
