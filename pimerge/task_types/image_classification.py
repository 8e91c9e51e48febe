"""Classes of images (columns ``image``, ``label``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pimerge.task_types import Batch, Examples, Rows
from pimerge.task_types._classification import FIELDS, TRAINS_HEAD, check, draw, nll, read, score

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pimerge.task_file import TaskFile

__all__ = [
    "AUTO_MODEL",
    "COLUMNS",
    "FIELDS",
    "PEFT_TASK",
    "TRAINS_HEAD",
    "check",
    "draw",
    "encode",
    "load_processor",
    "nll",
    "read",
    "score",
]

AUTO_MODEL = "AutoModelForImageClassification"
PEFT_TASK = None  # PEFT has no task type for images; its plain PeftModel serves them
COLUMNS = {"image": True, "label": True}

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_KEPT_BYTES = 256 * 2**20


def load_processor(source: str, revision: str | None) -> Any:
    """The base's image processor."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)


def encode(rows: Rows, file: TaskFile, processor: Any, config: PreTrainedConfig) -> Examples:
    """Decode and process an image when it is asked for; up to 256 MB of them are kept for the next epoch."""
    mode = _MODES[getattr(config, "num_channels", 3)]
    images = rows.table[rows.columns["image"]]
    kept: dict[int, torch.Tensor] = {}

    def pixels(index: int) -> torch.Tensor:
        if index in kept:
            return kept[index]
        values: torch.Tensor = processor(images[index].convert(mode), return_tensors="pt")["pixel_values"][0]
        if (len(kept) + 1) * values.nbytes <= _KEPT_BYTES:
            kept[index] = values
        return values

    def get(index: int) -> Batch:
        return {"pixel_values": pixels(index), "labels": torch.tensor(rows.labels[index])}

    def collate(examples: Sequence[Batch]) -> Batch:
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    return Examples([_tokens(config, pixels(0))] * len(rows.labels), get, collate)


def _tokens(config: PreTrainedConfig, pixel_values: torch.Tensor) -> int:
    """Patches of an image, and one for the class token; models without patches count 16 × 16 pixels as one."""
    patch = getattr(config, "patch_size", None)
    patch = patch if isinstance(patch, int) and patch > 0 else 16
    _, height, width = pixel_values.shape
    return (height // patch) * (width // patch) + 1
