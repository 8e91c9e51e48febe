"""Load bases in tests, and compare their state."""

from __future__ import annotations

from pathlib import Path

import torch

from pimerge.checkpoints.base import find_base
from pimerge.models.loaded_base import LoadedBase
from pimerge.models.loading import load_base
from pimerge.tasks.task import open_task

CPU = torch.device("cpu")


def load(base: Path, task: Path, dtype: torch.dtype = torch.float32) -> LoadedBase:
    return load_base(find_base(str(base), None, base), open_task(task), CPU, dtype)


def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def state_of(loaded: LoadedBase) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in loaded.model.state_dict().items()}


def require_same(loaded: LoadedBase, before: dict[str, torch.Tensor]) -> None:
    after = loaded.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
