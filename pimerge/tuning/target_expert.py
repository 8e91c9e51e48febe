"""Make an expert at the pool's init for a target without one, so that its Fisher can be compared with the pool's.

At the init ΔW is zero: A is the mean of the pool's factors A, which training moves little, and B is zero. There, the
Fisher of B characterises the target's task, and the Fisher of A is zero. An expert without ΔW is at its neutral point;
tensors without a neutral point, such as the down-projections of a bottleneck and all of a prefix, are the pool's mean.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pimerge.adapters.additive_tensors import sum_of
from pimerge.adapters.compatibility import differing_form, init_cosine
from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.expert_files import CONFIG, TASK, WEIGHTS
from pimerge.checkpoints.base import Base
from pimerge.core.errors import PimergeError
from pimerge.core.files import json_text, write_folder
from pimerge.core.progress import Track, silent
from pimerge.merging.tensor_merge import base_reader
from pimerge.tasks.task import Task
from pimerge.tuning.method import METHODS
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.run import TuneInputs, run_tuning

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NewTarget:
    """A target without its own expert, and the pool whose init it takes.

    Attributes:
        pool: experts of one kind, form and init.
        task: task of the target.
        options: training options of the head and the expert.
    """

    pool: Sequence[Expert]
    task: Task
    base: Base
    options: TrainingOptions
    device: str = "auto"
    dtype: str = "auto"

    def inputs(self, method: str, **given: Any) -> TuneInputs:
        """Make the inputs of a tuning on the target's task."""
        return TuneInputs(
            method=METHODS.load(method),
            task=self.task,
            base=self.base,
            options=self.options,
            device=self.device,
            dtype=self.dtype,
            **given,
        )


@contextmanager
def initial_expert(target: NewTarget, track: Track = silent) -> Iterator[Expert]:
    """Make an expert at the pool's init in a temporary folder, with a head if the target's task trains one.

    The head is trained on the bare base.
    """
    pool, task, base = target.pool, target.task, target.base
    like = pool[0]
    if like.is_computed:
        raise PimergeError(
            f"the pool's experts are of kind {like.kind}, which has no init from which a target can start",
            "rank by its examples (--measure combined), or train an expert for it first",
        )
    for other in pool[1:]:
        cosine, least = (0.0, 1.0) if differing_form(like, other) else init_cosine(like, other)
        if cosine < least:
            raise PimergeError(
                f"'{other.name}' and '{like.name}' do not share an init, so the target has none to start from",
                "rank by its examples (--measure combined), or name one pool's experts to 'pimerge embed' alone",
            )
    with tempfile.TemporaryDirectory() as folder:
        tensors, modules = {}, None
        if task.type.trains_head:
            head = Path(folder) / "head"
            run_tuning(target.inputs("head", like=like), head, track=track)
            with_head = open_expert(head, base.reference)
            prefix = like.strategy.prefix
            tensors = {prefix + name: tensor for name, tensor in with_head.head_tensors().items()}
            modules = with_head.config.get("modules_to_save")
        tensors |= _neutral_tensors(pool, base) if like.tensor_sets else _zero_updates(pool)
        config = {**like.config, "modules_to_save": modules}
        path = Path(folder) / task.name
        from safetensors.torch import save

        contents: dict[str, bytes | str] = {
            WEIGHTS: save({key: tensor.contiguous() for key, tensor in tensors.items()}, {"format": "pt"}),
            CONFIG: json_text(config),
            TASK: json_text(task.document_for(path)),
        }
        write_folder(path, contents, force=False)
        yield open_expert(path, base.reference)


def _zero_updates(pool: Sequence[Expert]) -> dict[str, Tensor]:
    """Map each key to its tensor, for ΔW = 0 with the mean of the factors A."""
    like = pool[0]
    tensors = {}
    for module in like.modules.values():
        tensors[module.A] = _mean([expert.tensor(module.A) for expert in pool])
        tensors[module.B] = torch.zeros_like(like.tensor(module.B))
        if module.bias:
            tensors[module.bias] = torch.zeros_like(like.tensor(module.bias))
    return tensors


def _neutral_tensors(pool: Sequence[Expert], base: Base) -> dict[str, Tensor]:
    """Map each key to its tensor at the neutral point, or to the pool's mean if there is none."""
    still = [expert.with_strength(0.0) if expert.has_strength else expert for expert in pool]
    found = sum_of(still, [1 / len(still)] * len(still), base_reader(base))
    return {key: tensor.to(pool[0].tensor(key).dtype) for key, tensor in found.items()}


def train_expert(target: NewTarget, output: Path, *, force: bool = False, track: Track = silent) -> None:
    """Train the target's own expert from the pool's init, so that it can be compared with the pool's experts."""
    with initial_expert(target, track) as start:
        run_tuning(target.inputs("interpolated", experts=[start], target=start), output, force=force, track=track)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    wide = torch.stack([tensor.double() for tensor in tensors]).mean(0)
    return wide.to(tensors[0].dtype)
