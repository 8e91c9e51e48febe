"""Compose experts inside the model, train on the target's examples, export one expert.

Training goes through transformers' Trainer: mixed precision, schedules, early stopping, several GPUs and
checkpoints come with it. A run that was killed goes on from its last whole checkpoint, which lies beside the
output until the output is complete.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from torch import nn

from pimerge import strategies
from pimerge.base import Base
from pimerge.compatibility import require_alike, require_finite
from pimerge.composition import GRANULARITIES, ComposedLinear, Member, Mixture, compose
from pimerge.errors import PimergeError, Problems
from pimerge.expert import Expert
from pimerge.export import Coefficients, Head, write_expert
from pimerge.files import disk_errors, relative_to, require_absent, sha256_bytes
from pimerge.kinds.lora import Factors, LoraModule, parse
from pimerge.lowrank import MergedModule, merge_module, relative_error
from pimerge.manifest import Manifest, inputs_of, library_versions
from pimerge.merge_methods import uniform
from pimerge.model import LoadedBase, load_base, resolve_device, resolve_dtype, set_head
from pimerge.progress import Track, silent
from pimerge.task import Task
from pimerge.task_types import Examples
from pimerge.tune_methods import Plan

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

STARTS = ("ranking", "equal")
_ROOM_FOR_CHECKPOINTS = 64 * 2**20


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        epochs: most passes over the training examples; early stopping may end it before.
        lr: learning rate of factors and head; ``weights_lr`` that of the mixture's logits.
        holdout: share of the training examples kept for early stopping, the same of each class; 0 for none.
        patience: epochs without a better held-out loss before it stops.
        shots: examples drawn of each class; None for all.
        rank: of the exported expert; None keeps every direction.
        fresh_rank, fresh_alpha, fresh_modules: of a fresh expert; None for the pool's, else r = alpha = 8 on
            the modules that PEFT adapts in this architecture.
        init_seed: of a fresh expert, so that several tasks share one init; ``seed`` decides all else.
    """

    epochs: float = 30
    lr: float = 2e-3
    weights_lr: float = 5e-2
    batch_size: int = 16
    seed: int = 0
    holdout: float = 0.2
    patience: int = 8
    shots: int | None = None
    label_smoothing: float = 0.1
    warmup: float = 0.06
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    granularity: str = "matrix"
    rank: int | None = None
    fresh_rank: int | None = None
    fresh_alpha: float | None = None
    fresh_modules: tuple[str, ...] | None = None
    init_seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` wrote.

    Attributes:
        truncation: relative error of cutting the sum to the asked rank.
        held_out_loss: the best one; None without held-out examples.
    """

    path: Path
    rank: int
    truncation: float
    epochs: float
    train_loss: float
    held_out_loss: float | None
    examples: int
    trained_parameters: int
    weights: dict[str, list[float]]
    experts: list[str]


def tune(
    method: str,
    task: Task,
    base: Base,
    experts: Sequence[Expert],
    target: Expert | None,
    output: Path,
    options: Options,
    *,
    scores: Sequence[float | None] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    track: Track = silent,
    note: Callable[[str], None] = lambda message: None,
) -> Tuned:
    """Compose, train and export.

    Args:
        method: a tune method.
        task: the target's task.
        experts: the chosen ones.
        target: the target's own expert, if it has one.
        scores: of the experts in the ranking; the weights start from their softmax, with 1/N for the target's
            own. None, or None for one of them, is an equal start.
        note: told what the user should know, a sentence at a time.

    Raises:
        PimergeError: if the experts, the task, an option or the disk has a problem.
    """
    plan: Plan = strategies.load("tune_methods", method).PLAN
    require_absent(output, force)
    _check_options(options)
    chosen = _chosen(plan, method, experts, target)
    like = target.sha256 if target else None
    run = _run_folder(method, task, base, chosen, output, options, scores, device, dtype, like)
    resolved = resolve_device(device)
    precision = resolve_dtype(dtype, resolved)
    loaded = load_base(base, task, resolved, precision, options.seed)
    members, fresh = _members(plan, loaded, chosen, target, options, note)
    head_from = target if plan.target else None
    if head_from is not None and head_from.head:
        set_head(loaded.model, head_from.head_tensors())
    logits = _start(plan, len(members), experts, chosen, scores)
    names = sorted({name for member in members for name in member.modules})
    mixture = Mixture(names, logits, options.granularity, plan.train_weights and len(members) > 1)
    layers = compose(loaded.model, members, mixture, plan.train_experts)
    train, held_out = _examples(task, loaded, options, note)
    model = _trainable(loaded, mixture.to(resolved))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    checkpoint = _last_whole_checkpoint(run)
    if checkpoint is not None:
        note(f"resuming from {checkpoint.name} of an interrupted run")
    trainer = _trainer(model, mixture, train, held_out, run, options, resolved, precision, track)
    with _training_errors(run):
        _train(trainer, checkpoint)
    _require_converged(model)
    merged = _collapse(layers, members, mixture, options.rank)
    coefficients = Coefficients(
        method=method,
        granularity=options.granularity,
        experts=[relative_to(expert.path, output) for expert in chosen],
        sha256=[expert.sha256 for expert in chosen],
        experts_trained=plan.train_experts,
        weights=mixture.weights(),
    )
    results: dict[str, Any] = {
        "truncation": relative_error(merged),
        "epochs": trainer.state.epoch,
        "train_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1],
        "held_out_loss": trainer.state.best_metric,
        "train_examples": len(train),
        "held_out_examples": len(held_out) if held_out else 0,
        "trained_parameters": trained,
    }
    if trainer.is_world_process_zero():  # under accelerate launch, one process writes
        head = Head({n: t.float().cpu() for n, t in loaded.head_tensors().items()}, loaded.head, task)
        write_expert(
            output,
            merged,
            head,
            base=base,
            like=_config_fields(loaded, task, layers),
            coefficients=coefficients if not fresh else None,
            manifest=Manifest(
                command="tune",
                options={
                    "method": method,
                    "target": task.name,
                    **asdict(options),
                    "start": logits,
                    "dtype": str(precision),
                },
                device=resolved.type,
                versions=library_versions(),
                inputs=inputs_of(list(chosen)),
                outputs={},
                results=results,
            ),
            force=force,
        )
        shutil.rmtree(run, ignore_errors=True)
    return Tuned(
        output,
        max(module.rank for module in merged),
        results["truncation"],
        results["epochs"],
        results["train_loss"],
        results["held_out_loss"],
        len(train),
        trained,
        mixture.weights(),
        [member.name for member in members],
    )


def fresh_lora(
    loaded: LoadedBase, rank: int, alpha: float, modules: Sequence[str] | None, seed: int, name: str = "fresh"
) -> Member:
    """A fresh LoRA expert with PEFT's own init (A Kaiming-uniform, B zero); the base comes back as it was.

    Args:
        modules: names or name endings; None for those that PEFT adapts in this architecture.

    Raises:
        PimergeError: if PEFT finds no such modules.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(modules) if modules else None,
        exclude_modules=list(loaded.head),
        base_model_name_or_path="",
    )
    try:
        model = get_peft_model(loaded.model, config)
    except ValueError as error:
        raise PimergeError(
            f"no modules to adapt in {type(loaded.model).__name__}: {str(error).partition(chr(10))[0]}",
            "pass --modules with the names of its projections, such as q_proj,v_proj",
        ) from error
    tensors = {key: value.detach().clone() for key, value in get_peft_model_state_dict(model).items()}
    model.unload()
    loaded.model.requires_grad_(False)
    layouts, _ = parse({"r": rank, "lora_alpha": alpha}, {key: tuple(value.shape) for key, value in tensors.items()})
    factors = {
        module: Factors(tensors[layout.A].float(), tensors[layout.B].float(), layout.scaling)
        for module, layout in layouts.items()
    }
    return Member(name, layouts, factors)


def split_holdout(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out, the same share of each class, at least one to train on.

    >>> split_holdout([0, 0, 0, 0, 1, 1, 1, 1], 0.25, seed=0)
    ([1, 2, 3, 5, 6, 7], [0, 4])
    """
    generator = torch.Generator().manual_seed(seed)
    held_out: list[int] = []
    for label in sorted(set(labels)):
        members = [index for index, value in enumerate(labels) if value == label]
        order = torch.randperm(len(members), generator=generator).tolist()
        count = min(round(share * len(members)), len(members) - 1)
        held_out += [members[i] for i in order[:count]]
    kept = set(held_out)
    return [index for index in range(len(labels)) if index not in kept], sorted(held_out)


def _check_options(options: Options) -> None:
    problems = Problems()
    positive = ("epochs", "lr", "weights_lr", "batch_size", "patience", "max_grad_norm")
    for field in positive:
        if not getattr(options, field) > 0:
            problems.add(f"--{field.replace('_', '-')} is {getattr(options, field)}, expected more than 0")
    for field in ("holdout", "label_smoothing", "warmup"):
        if not 0 <= getattr(options, field) < 1:
            problems.add(f"--{field.replace('_', '-')} is {getattr(options, field)}, expected 0 or more and below 1")
    for field in ("rank", "fresh_rank", "shots"):
        if getattr(options, field) is not None and getattr(options, field) < 1:
            problems.add(f"--{field.replace('_', '-')} is {getattr(options, field)}, expected at least 1")
    if options.granularity not in GRANULARITIES:
        problems.add(f"--granularity is '{options.granularity}'", f"expected {', '.join(GRANULARITIES)}")
    problems.raise_any("the options do not fit")


def _chosen(plan: Plan, method: str, experts: Sequence[Expert], target: Expert | None) -> list[Expert]:
    """The experts in the sum, the target's own first; checked to fit each other."""
    if not plan.experts:
        return []
    if not experts:
        raise PimergeError(
            f"'{method}' needs experts to compose", "run 'pimerge rank --target NAME' first, or name the experts"
        )
    if plan.target and target is not None:
        experts = [target, *(expert for expert in experts if expert.path.resolve() != target.path.resolve())]
    require_alike(experts)
    require_finite(experts)
    return list(experts)


def _start(
    plan: Plan,
    count: int,
    experts: Sequence[Expert],
    chosen: Sequence[Expert],
    scores: Sequence[float | None] | None,
) -> list[float]:
    """Logits whose softmax the weights start from: the scores, and 1/N for a member that has none."""
    by_path = dict(zip((expert.path.resolve() for expert in experts), scores or [], strict=False))
    known = [by_path.get(expert.path.resolve()) for expert in chosen]
    ranked = [score for score in known if score is not None]
    own = count - len(chosen) + (1 if plan.target and len(chosen) == count else 0)  # target's or fresh: no score
    if not plan.ranked_start or not ranked or len(ranked) < count - own:
        return [0.0] * count
    # log-mean-exp of the others' scores: a softmax share of exactly 1/N
    middle = math.log(sum(math.exp(score) for score in ranked) / len(ranked))
    return [middle] * own + ranked


def _members(
    plan: Plan,
    loaded: LoadedBase,
    chosen: Sequence[Expert],
    target: Expert | None,
    options: Options,
    note: Callable[[str], None],
) -> tuple[list[Member], bool]:
    """The members of the sum, and whether one of them is fresh."""
    members = [
        Member(expert.name, expert.modules, {name: expert.factors(name) for name in expert.modules})
        for expert in chosen
    ]
    if not plan.fresh and not (plan.target and target is None):
        return members, False
    like = target or (chosen[0] if chosen else None)
    rank = options.fresh_rank or (max(like.ranks) if like else 8)
    alpha = options.fresh_alpha
    if alpha is None:
        alpha = max((module.alpha for module in like.modules.values()), default=float(rank)) if like else float(rank)
        alpha = alpha * rank / max(like.ranks) if like else alpha
    modules = options.fresh_modules or (tuple(sorted(like.modules)) if like else None)
    fresh = fresh_lora(loaded, rank if plan.train_experts else 1, alpha, modules, options.init_seed)
    if plan.target:
        note("the target has no expert of its own: a fresh one takes its place")
    return [fresh, *members], True


def _examples(
    task: Task, loaded: LoadedBase, options: Options, note: Callable[[str], None]
) -> tuple[Examples, Examples | None]:
    examples, labels = task.examples("train", loaded.processor, loaded.config, shots=options.shots, seed=options.seed)
    if examples.truncated:
        note(f"{examples.truncated} training examples are longer than the model takes and were cut")
    kept, held_out = split_holdout(labels, options.holdout, options.seed)
    if options.holdout and not held_out:
        note("too few examples to hold any out: no early stopping")
    return _subset(examples, kept), _subset(examples, held_out) if held_out else None


def _subset(examples: Examples, indices: Sequence[int]) -> Examples:
    return Examples([examples.lengths[i] for i in indices], lambda i: examples.get(indices[i]), examples.collate)


def _trainable(loaded: LoadedBase, mixture: Mixture) -> nn.Module:
    """The composed model as the Trainer sees it: its state is what trains, so checkpoints are small."""
    for name, parameter in loaded.model.named_parameters():
        if any(name.startswith(module + ".") for module in loaded.head):
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(True)

    class Trainable(nn.Module):
        accepts_loss_kwargs = False
        _keys_to_ignore_on_save = None

        def __init__(self) -> None:
            super().__init__()
            self.model, self.mixture, self.config = loaded.model, mixture, loaded.config

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
    run: Path,
    options: Options,
    device: torch.device,
    precision: torch.dtype,
    track: Track,
) -> Trainer:
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(run),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=max(64, options.batch_size),
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup,  # below 1 it is a share of all steps
        max_grad_norm=options.max_grad_norm,
        label_smoothing_factor=options.label_smoothing,
        bf16=precision == torch.bfloat16,
        use_cpu=device.type == "cpu",
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
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device.type == "cuda",
    )
    callbacks: list[Any] = [_progress_callback(track)]
    if held_out:
        callbacks.append(EarlyStoppingCallback(options.patience))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=train.collate,
        callbacks=callbacks,
        optimizers=(_optimizer(model, mixture, options), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


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


def _require_converged(model: nn.Module) -> None:
    if not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
        raise PimergeError("the training diverged: NaN or Inf in what was trained", "pass a lower --lr or --weights-lr")


def _optimizer(model: nn.Module, mixture: Mixture, options: Options) -> torch.optim.Optimizer:
    """AdamW; the mixture's logits have their own learning rate and no decay."""
    others = [p for p in model.parameters() if p.requires_grad and p is not mixture.logits]
    groups: list[dict[str, Any]] = [{"params": others, "lr": options.lr, "weight_decay": options.weight_decay}]
    if mixture.logits.requires_grad:
        groups.append({"params": [mixture.logits], "lr": options.weights_lr, "weight_decay": 0.0})
    return torch.optim.AdamW(groups)


def _progress_callback(track: Track) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc]
        """Shows steps and the last loss."""

        def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
            self.context = track("training", state.max_steps, "steps")
            self.advance = self.context.__enter__()
            self.advance(state.global_step)
            self.loss = ""

        def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
            self.advance(1, self.loss)

        def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.loss = f"loss {float(logs['loss']):.3f}"
            if logs and "eval_loss" in logs:
                self.loss = f"{self.loss.partition(',')[0]}, held out {float(logs['eval_loss']):.3f}"

        def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
            self.context.__exit__(None, None, None)

    return Progress()


def _collapse(
    layers: dict[str, ComposedLinear], members: Sequence[Member], mixture: Mixture, rank: int | None
) -> list[MergedModule]:
    """The trained sum as one expert, module by module."""
    weights = mixture.weights()
    merged = []
    for name, layer in layers.items():
        layout: LoraModule = next(member.modules[name] for member in members if name in member.modules)
        merged.append(
            merge_module(
                layout, layer.parts(len(members)), weights[name], uniform.merge, rank=rank, dtype=torch.float32
            )
        )
    return merged


def _config_fields(loaded: LoadedBase, task: Task, layers: dict[str, ComposedLinear]) -> dict[str, Any]:
    """What PEFT's config says besides the factors."""
    kind = type(loaded.model)
    return {
        "task_type": task.type.PEFT_TASK,
        "auto_mapping": None
        if task.type.PEFT_TASK
        else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "fan_in_fan_out": any(type(layer.layer).__name__ == "Conv1D" for layer in layers.values()),
    }


def _run_folder(method: str, task: Task, base: Base, chosen: Sequence[Expert], output: Path, *rest: Any) -> Path:
    """Where checkpoints lie: beside the output, a folder for each choice of inputs and options."""
    options = [asdict(part) if isinstance(part, Options) else part for part in rest]
    choice = [method, task.sha256(), base.identity, [expert.sha256 for expert in chosen], options]
    digest = sha256_bytes(json.dumps(choice, sort_keys=True, default=str).encode())[:12]
    return output.resolve().with_name(f".{output.name}.training-{digest}")


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
