"""A base in memory, for one task, on which tune methods are tried one after the other.

A method is given a :class:`TuneRequest` and leaves a :class:`TuneResult` in the base's model; afterwards the base is
as it was.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pimerge.adapters.expert import Expert
from pimerge.checkpoints.base import Base
from pimerge.core.manifest import Manifest
from pimerge.core.progress import Track, silent
from pimerge.models.heads import initialise_head
from pimerge.models.injection import modules_restored, tensors_restored
from pimerge.models.loaded_base import LoadedBase
from pimerge.models.loading import load_base, resolve_device, resolve_dtype
from pimerge.tasks.examples import Examples
from pimerge.tasks.sampling import split_fold, split_holdout
from pimerge.tasks.task import Task
from pimerge.tuning.class_name_examples import class_names
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.trainer import TrainingOutcome


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
        """Draw the head by the seed; after the block take out whatever was put into the base.

        Yields:
            where a method leaves what else is to be undone.
        """
        model = self.loaded.model
        changing = [*self.loaded.head_parameters(), *model.buffers()]  # training counts in some buffers
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
    """Load a base for a task.

    Raises:
        PimergeError: if the device, the dtype or the base cannot be had.
    """
    resolved = resolve_device(device)
    precision = resolve_dtype(dtype, resolved)
    session = TuningSession(task, base, load_base(base, task, resolved, precision, seed), resolved, precision)
    gc.collect()
    gc.freeze()  # the Trainer collects garbage before it trains, and looks through all that the libraries hold
    return session


@dataclass(frozen=True)
class TuneRequest:
    """What a tune method is given.

    Attributes:
        experts: the chosen ones, each at its strength, best first.
        target: the target's own expert, if it has one.
        like: whose rank, alpha and modules a fresh expert has; None for the usual ones.
        scores: of the experts in the ranking, or None.
        run: folder of the checkpoints.
        gains: what the ranking expects of each expert over the bare base, or None.
        fold: which of how many folds is held out, in place of a share; None for the share.
        undo: what is done before the base is used again.
        note: told what the user should know, a sentence at a time.
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
    note: Callable[[str], None] = lambda message: None
    fold: tuple[int, int] | None = None
    undo: ExitStack = field(default_factory=ExitStack)

    def with_options(self, part: str, **changes: Any) -> TuneRequest:
        """The same with other options, for a part of a method; its checkpoints lie in a folder of that name."""
        return replace(self, options=replace(self.options, **changes), run=self.run / part)

    def examples(self, form: Expert | None = None) -> tuple[Examples, Examples | None]:
        """What is trained on, and what is held out; names of classes are among the former, if the options say so.

        Args:
            form: an expert that takes room before the text.
        """
        loaded, options = self.session.loaded, self.options
        config = loaded.config_for([form] if form else [])
        examples, labels = self.session.task.examples(
            "train", loaded.processor, config, shots=options.shots, seed=options.seed
        )
        if examples.truncated:
            self.note(f"{examples.truncated} training examples are longer than the model takes and were cut")
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
    """What a tune method made; it is in the base's model until the session is restored.

    Attributes:
        model: the module that answers.
        outcome: how the training went.
        experts: their names, those that no folder holds first.
        weights: module → weight of each of them.
        scales: strength of each of them, before its weight.
        examples: how many were trained on; ``held_out``: how many were not.
        rank: of the update; 0 for kinds without ΔW.
        truncation: relative error of cutting it to that rank.
        deployed_parameters: numbers that the result adds to the base.
        settings: what the method came to use, for the manifest.
        write: puts it into a folder, whole or not at all, with this manifest; the last says whether to replace one.
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
