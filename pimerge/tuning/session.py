"""A base in memory for one task, on which tune methods run one after the other.

A method takes a :class:`TuneRequest` and leaves its :class:`TuneResult` in the base's model; after the run, the session
restores the base.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pimerge.adapters.expert import Expert
from pimerge.adapters.expert_files import CONFIG, TASK
from pimerge.checkpoints.base import Base
from pimerge.core.errors import PimergeError
from pimerge.core.files import hashes_of, json_text, write_into
from pimerge.core.hf_loading import load_adapter
from pimerge.core.manifest import MANIFEST_FILE, Manifest
from pimerge.core.progress import Note, Track, silent, unheard
from pimerge.models.heads import initialise_head
from pimerge.models.injection import modules_restored, tensors_restored
from pimerge.models.loaded_base import LoadedBase
from pimerge.models.loading import load_base, resolve_device, resolve_dtype
from pimerge.tasks.examples import Examples
from pimerge.tasks.sampling import split_fold, split_holdout
from pimerge.tasks.task import Task
from pimerge.tuning.class_name_examples import class_names
from pimerge.tuning.options import TrainingOptions

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TuningSession:
    """A base for a task, on a device.

    Attributes:
        precision: float32, or bfloat16 for mixed precision.
    """

    task: Task
    base: Base
    loaded: LoadedBase
    device: torch.device
    precision: torch.dtype

    @contextmanager
    def restored(self, seed: int) -> Iterator[ExitStack]:
        """Initialise the head with the seed, and restore the base after the block.

        Yields:
            a stack to which a method can add further clean-up.
        """
        model = self.loaded.model
        changing = [*self.loaded.head_parameters(), *model.buffers()]  # training changes some buffers
        try:
            with tensors_restored(changing), modules_restored(model), ExitStack() as undo:
                # trained parameters are float32, and the Trainer's own autocast covers only its training steps
                if self.precision == torch.bfloat16:
                    model.forward = torch.autocast(self.device.type, self.precision)(model.forward)
                initialise_head(self.loaded, seed)
                yield undo
        finally:
            model.eval()


def open_session(task: Task, base: Base, device: str = "auto", dtype: str = "auto", seed: int = 0) -> TuningSession:
    """Load a base for a task."""
    resolved = resolve_device(device)
    precision = resolve_dtype(dtype, resolved)
    session = TuningSession(task, base, load_base(base, task, resolved, precision, seed), resolved, precision)
    gc.collect()
    gc.freeze()  # the Trainer collects garbage before training; skip the libraries' many objects
    return session


@dataclass(frozen=True)
class TuneRequest:
    """The inputs of a tune method.

    Attributes:
        experts: the chosen experts, each at its strength, best first.
        target: the target's own expert, if there is one.
        like: the expert whose rank, alpha and modules a fresh expert takes; None uses defaults.
        scores: the ranking's score of each expert, if known.
        run: folder of the checkpoints.
        gains: the ranking's expected gain of each expert over the bare base, if known.
        fold: (index, count) of the fold to hold out; None holds out the share in ``options``.
        undo: clean-up that runs before the base is used again.
        note: receives notes for the user, one sentence at a time.
    """

    session: TuningSession
    experts: Sequence[Expert]
    target: Expert | None
    like: Expert | None
    scores: Sequence[float | None] | None
    options: TrainingOptions
    run: Path
    gains: Sequence[float | None] | None = None
    track: Track = silent
    note: Note = unheard
    fold: tuple[int, int] | None = None
    undo: ExitStack = field(default_factory=ExitStack)

    def with_options(self, part: str, **changes: Any) -> TuneRequest:
        """The request with other options; checkpoints go to the subfolder ``part``."""
        return replace(self, options=replace(self.options, **changes), run=self.run / part)

    def examples(self, form: Expert | None = None) -> tuple[Examples, Examples | None]:
        """The training examples, with class names if the options ask for them, and the held-out examples.

        Args:
            form: an expert that may put vectors before the text, which leaves room for fewer tokens.
        """
        loaded, options = self.session.loaded, self.options
        config = loaded.config_for([form] if form else [])
        examples, labels = self.session.task.examples(
            "train", loaded.processor, config, shots=options.shots, seed=options.seed
        )
        for remark in examples.remarks():
            self.note(f"train split: {remark}")
        if self.fold is not None:
            kept, held_out = split_fold(labels, *self.fold, options.seed)
        else:
            kept, held_out = split_holdout(labels, options.holdout or 0.0, options.seed)
        if options.holdout and not held_out:
            self.note("too few examples to hold any out: no early stopping")
        trained_on = examples.subset(kept)
        if options.class_names:
            trained_on = trained_on.joined(class_names(self.session.task, loaded.processor, config))
        return trained_on, examples.subset(held_out) if held_out else None


@dataclass(frozen=True)
class TrainingOutcome:
    """Losses and size of a training.

    Attributes:
        epochs: passes over the training examples.
        train_loss: training loss of the last pass; None if nothing trained.
        held_out_loss: lowest held-out loss; None without held-out examples.
        held_out_losses: held-out loss after each pass; empty if the result combines several trainings.
        trained_parameters: number of trained parameters.
        writes: whether this process writes the result; under ``accelerate launch`` only one process does.
    """

    epochs: float
    train_loss: float | None
    held_out_loss: float | None
    held_out_losses: tuple[float, ...]
    trained_parameters: int
    writes: bool


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """The result of a tune method; it is in the base's model until the session restores the base.

    Attributes:
        model: the module to call.
        outcome: losses and size of the training.
        experts: names of the experts; fresh experts, which are in no folder, come first.
        weights: module → weight of each expert.
        scales: strength of each expert, before its weight.
        examples: number of training examples.
        held_out: number of held-out examples.
        rank: highest rank of an update; 0 for kinds without ΔW.
        truncation: relative error of truncating the update to that rank.
        deployed_parameters: number of parameters that the result adds to the base.
        settings: settings that the method chose, for the manifest.
        write: (folder, manifest, force) → None writes the result, completely or not at all.
        method: name of the method.
        output: output folder.
    """

    model: nn.Module
    outcome: TrainingOutcome
    examples: int
    held_out: int
    deployed_parameters: int
    write: Callable[[Path, Manifest, bool], None]
    experts: list[str] = field(default_factory=list)
    weights: dict[str, list[float]] = field(default_factory=dict)
    scales: list[float] = field(default_factory=list)
    rank: int = 0
    truncation: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    method: str = ""
    output: Path = Path()

    def to_dict(self) -> dict[str, Any]:
        """The document that ``pimerge tune --json`` prints."""
        return {
            "output": str(self.output),
            "method": self.method,
            "experts": self.experts,
            "scales": self.scales,
            "rank": self.rank,
            "truncation": self.truncation,
            "epochs": self.outcome.epochs,
            "train_loss": self.outcome.train_loss,
            "held_out_loss": self.outcome.held_out_loss,
            "examples": self.examples,
            "trained_parameters": self.outcome.trained_parameters,
            "deployed_parameters": self.deployed_parameters,
            "weights": self.weights,
        }

    def load(self, base_model: PreTrainedModel) -> PeftModel:
        """Put the tuned expert into a base model with PEFT."""
        from pimerge import peft_methods  # noqa: F401  PEFT has to know every kind

        if not (self.output / CONFIG).is_file():
            raise PimergeError(
                f"'{self.output}' of the method '{self.method}' is not one adapter",
                "score it with 'pimerge eval', or use another method",
            )
        return load_adapter(base_model, self.output)


def write_with_manifest(
    folder: Path, contents: Mapping[str, bytes | str], task: Mapping[str, Any], manifest: Manifest
) -> None:
    """Complete an output folder: write contents, ``task.json``, and a manifest with the hashes of all files."""
    write_into(folder, {**contents, TASK: json_text(task)})
    manifest = manifest.model_copy(update={"outputs": hashes_of(folder)})
    write_into(folder, {MANIFEST_FILE: json_text(manifest.model_dump())})
