"""Classes of images (columns ``image``, ``label``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pimerge.core import hf_loading
from pimerge.core.errors import PimergeError
from pimerge.tasks.examples import Batch, Examples, Rows
from pimerge.tasks.task_type import TaskType
from pimerge.tasks.types._classification import FIELDS, draw, nll, read, score
from pimerge.tasks.types._images import decoder, have_heads, mode_of, remembered, tell_broken

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from pimerge.tasks.schema import TaskFile


def load_processor(source: str, revision: str | None) -> Any:
    """Load the base's image processor."""
    from transformers import AutoImageProcessor

    return hf_loading.load_processor(AutoImageProcessor, source, revision)


def encode(rows: Rows, file: TaskFile, processor: Any, config: PreTrainedConfig) -> Examples:
    """Decode and process each image when it is read; up to 256 MB of them are cached for the next epoch."""
    import torch

    decode = decoder(rows, mode_of(config))
    if not have_heads(rows):
        tell_broken(rows, decode)

    def process(place: int) -> Batch:
        try:
            image = decode(place)
        except PimergeError:
            tell_broken(rows, decode)
            raise
        return {"pixel_values": processor(image, return_tensors="pt")["pixel_values"][0]}

    pixels = remembered(process)

    def get(index: int) -> Batch:
        return {**pixels(index), "labels": torch.tensor(rows.labels[index])}

    def collate(examples: Sequence[Batch]) -> Batch:
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    return Examples([_tokens(config, pixels(0)["pixel_values"])] * len(rows.labels), get, collate)


def _tokens(config: PreTrainedConfig, pixel_values: Tensor) -> int:
    """Count the patches of an image and one class token; without patches, 16 × 16 pixels count as one."""
    patch = getattr(config, "patch_size", None)
    patch = patch if isinstance(patch, int) and patch > 0 else 16
    _, height, width = pixel_values.shape
    return (height // patch) * (width // patch) + 1


TASK_TYPE = TaskType(
    name="image-classification",
    summary="Classes of images (columns ``image``, ``label``).",
    auto_model="AutoModelForImageClassification",
    peft_task=None,  # PEFT has no task type for images and uses its plain PeftModel
    trains_head=True,
    columns={"image": True, "label": True},
    usual_columns={"image": ("image", "img"), "label": ("label",)},
    fields=FIELDS,
    load_processor=load_processor,
    encode=encode,
    nll=nll,
    draw=draw,
    score=score,
    read=read,
)
