"""Train a mixture on a target's examples with transformers' Trainer.

The Trainer provides mixed precision, schedules, early stopping, multi-GPU training and checkpoints. An interrupted run
continues from its last complete checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pimerge.core.errors import PimergeError
from pimerge.core.files import disk_errors
from pimerge.core.progress import Track
from pimerge.tasks.examples import Examples
from pimerge.tuning.ema import EmaModel, average_parameters
from pimerge.tuning.loss import mean_loss
from pimerge.tuning.mixture import Mixture
from pimerge.tuning.optimizer import optimizer_of, sharpness_aware
from pimerge.tuning.session import TrainingOutcome, TuneRequest

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

LOWER = "pass a lower --lr or --weights-lr"
_ROOM_FOR_CHECKPOINTS = 64 * 2**20


class Diverged(PimergeError):
    """Training ended in NaN or Inf."""


def untrained() -> TrainingOutcome:
    """The outcome when nothing trains."""
    return TrainingOutcome(0, None, None, (), 0, writes=os.environ.get("RANK", "0") == "0")


def train(
    request: TuneRequest, model: nn.Module, mixture: Mixture, kept: Examples, held_out: Examples | None
) -> TrainingOutcome:
    """Train the head and all parameters that require gradients; keep the state with the lowest held-out loss.

    Training continues from the last complete checkpoint in the request's folder, if there is one.

    Args:
        model: the module to call: the base's model, or a wrapper such as PEFT's, which adds a prompt.
        mixture: the experts' weights.
        kept: the training examples; a label is a class, or a distribution over the classes (C).
        held_out: the examples for early stopping.
    """
    options = request.options
    for parameter in request.session.loaded.head_parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)
    model = Trainable(model, mixture, request.session.loaded.config)
    if options.ema is not None:
        model = EmaModel(model, options.ema)
    checkpoint = _last_complete_checkpoint(request.run)
    if checkpoint is not None:
        request.note(f"resuming from {checkpoint.name} of an interrupted run")
    with ExitStack() as stack, _training_errors(request.run):
        optimizer = optimizer_of(model, mixture, options)
        trainer = _trainer(request, model, optimizer, kept, held_out, stack)
        _train_from(trainer, checkpoint)
        trainer.accelerator.wait_for_everyone()  # one process deletes the folder
    model.eval()
    train_loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    try:
        _require_converged(model, train_loss, trainer.state.best_metric if held_out else 0.0)
    except PimergeError:
        shutil.rmtree(request.run, ignore_errors=True)  # never continue from a diverged checkpoint
        raise
    losses = tuple(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    if not all(map(math.isfinite, losses)):
        request.note(f"the training diverged; the last finite state is kept: {LOWER}")
    return TrainingOutcome(
        epochs=trainer.state.epoch,
        train_loss=train_loss,
        held_out_loss=trainer.state.best_metric,
        held_out_losses=losses,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        writes=trainer.is_world_process_zero(),
    )


class Trainable(nn.Module):
    """A model and a mixture whose state dict holds only trained parameters, which keeps checkpoints small."""

    accepts_loss_kwargs = False
    _keys_to_ignore_on_save = None

    def __init__(self, model: nn.Module, mixture: Mixture, config: Any) -> None:
        super().__init__()
        self.model, self.mixture, self.config = model, mixture, config

    def forward(self, **batch: Any) -> Any:
        """Call the model."""
        return self.model(**batch)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The trained parameters."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k in trained}


def _trainer(
    request: TuneRequest,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    kept: Examples,
    held_out: Examples | None,
    stack: ExitStack,
) -> Trainer:
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer

    options = request.options
    callbacks: list[Any] = [report_progress(request.track, stack)]
    if held_out:
        callbacks.append(EarlyStoppingCallback(options.patience))
    if options.stop_after is not None:
        callbacks.append(stop_after(options.stop_after))
    if isinstance(model, EmaModel):
        callbacks.append(average_parameters(model))
    trainer = (sharpness_aware(Trainer, options.sam) if options.sam else Trainer)(
        model=model,
        args=_arguments(request, held_out is not None),
        train_dataset=kept,
        eval_dataset=held_out,
        data_collator=kept.collate,
        callbacks=callbacks,
        compute_loss_func=partial(mean_loss, label_smoothing=options.label_smoothing),
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(request: TuneRequest, evaluated: bool) -> TrainingArguments:
    from transformers import TrainingArguments

    options, session = request.options, request.session
    return TrainingArguments(
        output_dir=str(request.run),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        # without a head, every token has logits over the whole vocabulary
        per_device_eval_batch_size=max(64, options.batch_size) if session.loaded.head else options.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup,  # a value below 1 is a fraction of all steps
        max_grad_norm=options.max_grad_norm,
        average_tokens_across_devices=False,  # the loss is already a mean
        bf16=session.precision == torch.bfloat16,
        use_cpu=session.device.type == "cpu",
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
        logging_nan_inf_filter=False,  # report a NaN loss as NaN
        log_level_replica="passive",  # the same as in the first process
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=session.device.type == "cuda",
    )


@contextmanager
def _training_errors(run: Path) -> Iterator[None]:
    """Turn the libraries' various errors on a full disk into one PimergeError."""
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
    """Raise :class:`Diverged` unless trained parameters and losses are finite; None is a loss that was never finite."""
    trained = all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)
    if not trained or not all(loss is not None and math.isfinite(loss) for loss in losses):
        what = "the loss" if trained else "the trained parameters"
        raise Diverged(f"the training diverged: NaN or Inf in {what}", LOWER)


def stop_after(epochs: int) -> TrainerCallback:
    """Make a callback that ends the training after a number of epochs."""
    from transformers import TrainerCallback

    class Stopping(TrainerCallback):  # type: ignore[misc]
        def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = control.should_training_stop or round(state.epoch) >= epochs

    return Stopping()


def report_progress(track: Track, stack: ExitStack) -> TrainerCallback:
    """Make a callback that reports steps and the latest losses."""
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


def _train_from(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if there is one.

    A training that had already ended is not continued, because the Trainer would forget its early stopping.
    """
    from transformers import TrainerState

    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            trainer.state = state
            best = Path(state.best_model_checkpoint or checkpoint)
            trainer.model.load_state_dict(load_file(best / "model.safetensors"), strict=False)
            return
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _last_complete_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that was written completely."""
    found = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in found if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    archives = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
    archives += sorted(checkpoint.glob("rng_state*.pth")) or [checkpoint / "rng_state.pth"]
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        load_file(checkpoint / "model.safetensors")
    except (OSError, ValueError, SafetensorError):
        return False
    best = state.get("best_model_checkpoint")
    return all(map(is_zipfile, archives)) and (best is None or (Path(best) / "model.safetensors").is_file())
