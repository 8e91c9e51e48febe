"""A base in memory, for one task, on which tune methods run one after the other.

A method takes a :class:`TuneRequest` and leaves a :class:`TuneResult` in the base's model; after the run the base is
restored.
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
from pimerge.tuning.mixture import Mixture
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.trainer import TrainingOutcome, TrainingRun, train

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
        """Initialise the head by the seed; after the block, remove whatever was put into the base.

        Yields:
            a stack on which a method leaves what else is to be undone.
        """
        model = self.loaded.model
        changing = [*self.loaded.head_parameters(), *model.buffers()]  # training changes some buffers
        try:
            with tensors_restored(changing), modules_restored(model), ExitStack() as undo:
                # what trains is in float32, and the Trainer casts for itself alone
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
    gc.freeze()  # the Trainer collects garbage before it trains, and looks through all that the libraries hold
    return session


@dataclass(frozen=True)
class TuneRequest:
    """What a tune method takes.

    Attributes:
        experts: the chosen ones, each at its strength, best first.
        target: the target's own expert, if it has one.
        like: whose rank, alpha and modules a fresh expert takes; None for the default ones.
        scores: the ranking's score of each expert, if known.
        run: folder of the checkpoints.
        gains: the gain over the bare base that the ranking expects of each expert, if known.
        fold: (index, count) of the fold that is held out in place of a share; None for the share.
        undo: what is undone before the base is used again.
        note: receives what the user should know, a sentence at a time.
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
        """The request with other options, for a part of a method; its checkpoints lie in a folder of that name."""
        return replace(self, options=replace(self.options, **changes), run=self.run / part)

    def train(
        self, model: nn.Module, mixture: Mixture, examples: Examples, held_out: Examples | None
    ) -> TrainingOutcome:
        """Train the head and whatever requires gradients in a model of the session; see :func:`trainer.train`."""
        return train(
            TrainingRun(
                loaded=self.session.loaded,
                model=model,
                mixture=mixture,
                examples=examples,
                held_out=held_out,
                folder=self.run,
                options=self.options,
                precision=self.session.precision,
                track=self.track,
                note=self.note,
            )
        )

    def examples(self, form: Expert | None = None) -> tuple[Examples, Examples | None]:
        """The examples to train on, with the names of classes if the options say so, and those that are held out.

        Args:
            form: an expert that takes room before the text.
        """
        loaded, options = self.session.loaded, self.options
        config = loaded.config_for([form] if form else [])
        examples, labels = self.session.task.examples(
            "train", loaded.processor, config, shots=options.shots, seed=options.seed
        )
        if examples.truncated:
            self.note(f"{examples.truncated} training examples are longer than the model accepts and were truncated")
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
class TuneResult:
    """What a tune method made. Until the session is restored it is in the base's model.

    Attributes:
        model: the module that answers.
        outcome: how the training went.
        experts: their names; fresh ones, which no folder holds, come first.
        weights: module → weight of each expert.
        scales: strength of each expert, before its weight.
        examples: how many were trained on.
        held_out: how many were held out.
        rank: the highest rank of an update; 0 for kinds without ΔW.
        truncation: relative error of cutting the update to that rank.
        deployed_parameters: how many numbers the result adds to the base.
        settings: what the method came to use, for the manifest.
        write: (folder, manifest, whether to replace what is there) writes the result, completely or not at all.
        method: name of the method.
        output: folder that it was written to.
    """

    model: nn.Module
    outcome: TrainingOutcome
    experts: list[str]
    weights: dict[str, list[float]]
    scales: list[float]
    examples: int
    held_out: int
    rank: int
    truncation: float
    deployed_parameters: int
    settings: dict[str, Any]
    write: Callable[[Path, Manifest, bool], None]
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
        from peft import PeftModel

        from pimerge import peft_methods  # noqa: F401  PEFT has to know every kind

        if not (self.output / CONFIG).is_file():
            raise PimergeError(
                f"'{self.output}' of the method '{self.method}' is not one adapter",
                "score it with 'pimerge eval', or use another method",
            )
        return PeftModel.from_pretrained(base_model, str(self.output))


def write_with_manifest(
    folder: Path, contents: Mapping[str, bytes | str], task: Mapping[str, Any], manifest: Manifest
) -> None:
    """Finish an output folder: contents, ``task.json`` and a manifest with the hashes of all its files."""
    write_into(folder, {**contents, TASK: json_text(task)})
    manifest = manifest.model_copy(update={"outputs": hashes_of(folder)})
    write_into(folder, {MANIFEST_FILE: json_text(manifest.model_dump())})
