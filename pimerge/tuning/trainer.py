"""Train a mixed model on a target's examples, by transformers' Trainer.

Mixed precision, schedules, early stopping, several GPUs and checkpoints come with the Trainer. A run that was
killed goes on from its last whole checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.functional import cross_entropy

from pimerge.core.errors import PimergeError
from pimerge.core.files import disk_errors
from pimerge.core.progress import Track, silent
from pimerge.models.loaded_base import LoadedBase
from pimerge.tasks.examples import IGNORED, Examples, bucket_by_length, on_device
from pimerge.tuning.ema import EmaModel
from pimerge.tuning.lora_layers import Mixture
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.sam import sharpness_aware

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer, TrainingArguments

LOWER = "pass a lower --lr or --weights-lr"
_TOKENS_AT_ONCE = 4096
_ROOM_FOR_CHECKPOINTS = 64 * 2**20


class Diverged(PimergeError):
    """A training that ended in NaN or Inf."""


@dataclass(frozen=True)
class TrainingOutcome:
    """How a training went.

    Attributes:
        epochs: passes over the training examples until it ended.
        train_loss: of the last pass, None if nothing trained; ``held_out_loss``: the best one, None without held-out
            examples.
        held_out_losses: after each pass; none where several trainings made the result.
        trained_parameters: numbers that trained.
        writes: whether this process writes the result (under ``accelerate launch`` one of several does).
    """

    epochs: float
    train_loss: float | None
    held_out_loss: float | None
    held_out_losses: tuple[float, ...]
    trained_parameters: int
    writes: bool


def untrained() -> TrainingOutcome:
    """Of a composition in which nothing trains."""
    return TrainingOutcome(0, None, None, (), 0, writes=os.environ.get("RANK", "0") == "0")


def train(
    loaded: LoadedBase,
    mixture: Mixture,
    train_examples: Examples,
    held_out: Examples | None,
    run: Path,
    options: TrainingOptions,
    precision: torch.dtype,
    *,
    through: nn.Module | None = None,
    track: Track = silent,
    note: Callable[[str], None] = lambda message: None,
) -> TrainingOutcome:
    """Train the head and whatever requires gradients in a mixed model; the best held-out state stays in it.

    Args:
        loaded: the base that holds the composition.
        mixture: its weights.
        train_examples: their labels may be shares of the classes in place of a class, (C) of each.
        run: the folder of the checkpoints; a whole one that lies there is gone on from.
        precision: float32, or bfloat16 for mixed precision.
        through: a model around the base that is called in its place, such as PEFT's, which puts a prompt in.

    Raises:
        PimergeError: if the disk is full or the training diverges.
    """
    model = _trainable(loaded, mixture, through or loaded.model)
    if options.ema is not None:
        model = EmaModel(model, options.ema)
    checkpoint = _last_whole_checkpoint(run)
    if checkpoint is not None:
        note(f"resuming from {checkpoint.name} of an interrupted run")
    with ExitStack() as stack, _training_errors(run):
        progress = _progress_callback(track, stack)
        at_once = max(64, options.batch_size) if loaded.head else options.batch_size  # of words there are many logits
        trainer = _trainer(model, mixture, train_examples, held_out, at_once, run, options, precision, progress)
        _train(trainer, checkpoint)
        trainer.accelerator.wait_for_everyone()  # one of them clears the folder away
    model.eval()
    train_loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    try:
        _require_converged(model, train_loss, trainer.state.best_metric if held_out else 0.0)
    except PimergeError:
        shutil.rmtree(run, ignore_errors=True)  # nothing in it is worth going on from
        raise
    losses = tuple(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    if not all(map(math.isfinite, losses)):
        note(f"the training diverged, and the state before is taken: {LOWER}")
    return TrainingOutcome(
        epochs=trainer.state.epoch,
        train_loss=train_loss,
        held_out_loss=trainer.state.best_metric,
        held_out_losses=losses,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        writes=trainer.is_world_process_zero(),
    )


def _trainable(loaded: LoadedBase, mixture: Mixture, model: nn.Module) -> nn.Module:
    """The mixed model as the Trainer sees it: its state is what trains, so checkpoints are small."""
    for parameter in loaded.head_parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)

    class Trainable(nn.Module):
        accepts_loss_kwargs = False
        _keys_to_ignore_on_save = None

        def __init__(self) -> None:
            super().__init__()
            self.model, self.mixture, self.config = model, mixture, loaded.config

        def forward(self, **batch: Any) -> Any:
            return self.model(**batch)

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k in trained}

    return Trainable()


def _trainer(
    model: nn.Module,
    mixture: Mixture,
    train: Examples,
    held_out: Examples | None,
    at_once: int,
    run: Path,
    options: TrainingOptions,
    precision: torch.dtype,
    progress: Any,
) -> Trainer:
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(run),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=at_once,
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup,  # below 1 it is a share of all steps
        max_grad_norm=options.max_grad_norm,
        average_tokens_across_devices=False,  # the loss is a mean
        bf16=precision == torch.bfloat16,
        use_cpu=mixture.logits.device.type == "cpu",
        seed=options.seed,
        data_seed=options.seed,
        eval_strategy="epoch" if held_out else "no",
        save_strategy="epoch",
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,  # a resumed run keeps its patience
        load_best_model_at_end=held_out is not None,
        metric_for_best_model="eval_loss" if held_out else None,
        greater_is_better=False if held_out else None,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # a loss that is no number is told as such
        log_level_replica="passive",  # as the first process's: as the program has it
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=mixture.logits.device.type == "cuda",
    )
    callbacks: list[Any] = [progress]
    if held_out:
        callbacks.append(EarlyStoppingCallback(options.patience))
    if options.stop_after is not None:
        callbacks.append(_stopping_callback(options.stop_after))
    if isinstance(model, EmaModel):
        callbacks.append(_averaging_callback(model))
    trainer = (sharpness_aware(Trainer, options.sam) if options.sam else Trainer)(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=train.collate,
        callbacks=callbacks,
        compute_loss_func=partial(mean_loss, label_smoothing=options.label_smoothing),
        optimizers=(_optimizer(model, mixture, options), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def mean_loss(output: Any, labels: Tensor, num_items_in_batch: Any = None, *, label_smoothing: float = 0.0) -> Tensor:
    """The mean over all targets of −Σ_c q_c log p_c, with q = (1 − ε)·[c is the target] + ε/C (arXiv 1512.00567).

    Models' own losses are no good here: some of them shift the labels, which are aligned already, and none of them
    smooths.

    Args:
        output: of the model; its logits are (…, C).
        labels: (…), −100 for none; or, (…, C), the shares of the classes as they are, q, 0 for none.
        num_items_in_batch: of the Trainer; not used.
        label_smoothing: ε.

    >>> from types import SimpleNamespace
    >>> output = SimpleNamespace(logits=torch.tensor([[[0.0, 0.0], [9.0, 0.0]]]))
    >>> round(float(mean_loss(output, torch.tensor([[1, -100]]))), 4)
    0.6931
    """
    if labels.is_floating_point():
        kept = labels.sum(-1) > 0
        return cross_entropy(output.logits[kept].to(labels.dtype), labels[kept])
    kept = labels != IGNORED
    logits = output.logits[:, -labels.shape[1] :] if labels.dim() > 1 else output.logits  # behind a prompt's vectors
    logits = logits[kept]
    return cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[kept], label_smoothing=label_smoothing
    )


def held_out_loss(model: nn.Module, examples: Examples, device: torch.device) -> float:
    """The mean over all targets of −log p, in nats, in eval mode."""
    model.eval()
    total, count = 0.0, 0
    for indices in bucket_by_length(examples.lengths, _TOKENS_AT_ONCE):
        batch = on_device(examples.batch(indices), device)
        labels = batch.pop("labels")
        targets = int((labels != IGNORED).sum())
        with torch.no_grad():
            output = model(**batch)
        total += targets * float(mean_loss(output, labels))
        count += targets
    return total / count


def _optimizer(model: nn.Module, mixture: Mixture, options: TrainingOptions) -> torch.optim.Optimizer:
    """AdamW; the mixture's logits have their own learning rate, and no decay but towards their start."""
    others = [p for p in model.parameters() if p.requires_grad and p is not mixture.logits]
    to_start = options.decay_towards == "start"
    decay = 0.0 if to_start else options.weight_decay
    groups: list[dict[str, Any]] = [{"params": others, "lr": options.lr, "weight_decay": decay}]
    if mixture.logits.requires_grad:
        groups.append({"params": [mixture.logits], "lr": options.weights_lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    if to_start:
        optimizer.register_step_post_hook(_towards_start(optimizer, options.weight_decay))
    return optimizer


def _towards_start(optimizer: torch.optim.Optimizer, decay: float) -> Callable[..., None]:
    """After each step w ← w − lr · decay · (w − w0), apart from the gradient, as AdamW decays towards 0."""
    starts = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}

    @torch.no_grad()
    def pull(*_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.lerp_(starts[parameter], group["lr"] * decay)

    return pull


def _stopping_callback(epochs: int) -> Any:
    from transformers import TrainerCallback

    class Stopping(TrainerCallback):  # type: ignore[misc]
        """Ends the training after so many passes."""

        def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = control.should_training_stop or round(state.epoch) >= epochs

    return Stopping()


def _averaging_callback(model: EmaModel) -> Any:
    from transformers import TrainerCallback

    class Averaging(TrainerCallback):  # type: ignore[misc]
        """Takes every step into the average."""

        def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
            model.update(state.global_step)

    return Averaging()


def _progress_callback(track: Track, stack: ExitStack) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc]
        """Shows steps and the last loss."""

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


def _train(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if there is one.

    A run that was killed after its training had ended is not trained on: the Trainer would forget that early
    stopping has ended it.
    """
    from safetensors.torch import load_file
    from transformers import TrainerState

    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            trainer.state = state
            best = Path(state.best_model_checkpoint or checkpoint)
            trainer.model.load_state_dict(load_file(best / "model.safetensors"), strict=False)
            return
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _last_whole_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that a kill did not cut short."""
    found = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in found if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    from safetensors.torch import load_file

    archives = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
    archives += sorted(checkpoint.glob("rng_state*.pth")) or [checkpoint / "rng_state.pth"]
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        load_file(checkpoint / "model.safetensors")
    except (OSError, ValueError, SafetensorError):
        return False
    best = state.get("best_model_checkpoint")
    return all(map(is_zipfile, archives)) and (best is None or (Path(best) / "model.safetensors").is_file())
