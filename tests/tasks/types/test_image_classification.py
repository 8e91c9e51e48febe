"""Images → pixel values, against the processor's own calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image
from transformers import AutoConfig, AutoImageProcessor

from pimerge.core.errors import PimergeError
from pimerge.tasks.examples import Examples, Rows
from pimerge.tasks.schema import TaskFile
from pimerge.tasks.types import image_classification as images


def encode(base: Path, pictures: list[Any], labels: list[int]) -> Examples:
    processor = images.load_processor(str(base), None)
    columns = {"image": "image", "label": "label"}
    table = Dataset.from_dict({"image": pictures}, features=Features(image=Image()))
    rows = Rows(table, columns, labels, range(len(labels)), "the train split")
    file = TaskFile(type="image-classification", data="images", labels=["a", "b"])
    return images.encode(rows, file, processor, AutoConfig.from_pretrained(base))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_an_image_of_any_mode_becomes_what_the_processor_makes_of_it_in_colour(
    vit_base: Path, scans: tuple[list[Any], list[int]], mode: str
) -> None:
    picture = scans[0][0].convert(mode)
    found = encode(vit_base, [picture], [3]).batch([0])
    processor = AutoImageProcessor.from_pretrained(vit_base)
    torch.testing.assert_close(
        found["pixel_values"], processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"], rtol=0, atol=0
    )
    assert found["labels"].tolist() == [3]


def test_an_image_that_was_kept_is_the_same_the_second_time(vit_base: Path, scans: tuple[list[Any], list[int]]) -> None:
    examples = encode(vit_base, scans[0][:3], [0, 1, 2])
    assert torch.equal(examples[2]["pixel_values"], examples[2]["pixel_values"])
    assert not torch.equal(examples[1]["pixel_values"], examples[2]["pixel_values"])


def test_an_image_counts_its_patches_and_the_class_token(vit_base: Path, scans: tuple[list[Any], list[int]]) -> None:
    assert list(encode(vit_base, scans[0][:2], [0, 0]).lengths) == [2 * 2 + 1] * 2


def test_an_image_that_cannot_be_decoded_is_an_error_with_its_row() -> None:
    table = Dataset.from_dict({"image": [{"bytes": b"no image", "path": None}]}).cast_column("image", Image())
    rows = Rows(table, {"image": "image", "label": "label"}, [0], [7], "the train split")
    config = AutoConfig.for_model("vit")
    file = TaskFile(type="image-classification", data="images", labels=["a", "b"])
    with pytest.raises(
        PimergeError, match=r"row 7 \(from 0\) of the train split: the image cannot be decoded: cannot "
    ):
        images.encode(rows, file, None, config)
