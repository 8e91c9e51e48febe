"""Images with more than 8 bits keep their grey levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pimerge.core.errors import PimergeError
from pimerge.tasks.examples import Rows
from pimerge.tasks.task import open_task
from pimerge.tasks.types._grey_levels import eight_bits
from pimerge.tasks.types._images import decoder
from tests.support.tasks import write_json

RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("a.png", RAMP.astype(np.uint8)),
        ("a.png", (RAMP * 257).astype(np.uint16)),
        ("a.tif", (RAMP * 257).astype(np.uint16)),
        ("a.tif", (RAMP * 257).astype(">u2")),
        ("a.tif", (RAMP * 257).astype(np.int32)),
        ("a.tif", RAMP.astype(np.int32)),
        ("a.tif", (RAMP / 255).astype(np.float32)),
        ("a.tif", RAMP.astype(np.float32)),
        ("a.tif", (RAMP * 257).astype(np.float32)),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_ramp_survives(tmp_path: Path, file: str, values: Any, mode: str) -> None:
    Image.fromarray(values).save(tmp_path / file)
    (tmp_path / "d.csv").write_text(f"image,label\n{file},a\n")
    write_json(
        tmp_path / "task.json", {"type": "image-classification", "data": {"train": "d.csv"}, "labels": ["a", "b"]}
    )
    rows: Rows = open_task(tmp_path)._rows("train")
    found = np.asarray(decoder(rows, mode)(0))
    assert (found == (RAMP if mode == "L" else RAMP[..., None])).all()


def test_a_dark_image_of_16_bits_stays_dark() -> None:
    assert eight_bits(Image.fromarray(np.full((2, 2), 2570, np.uint16))).getpixel((0, 0)) == 10


@pytest.mark.parametrize("values", [[-1000.0, 3000.0], [0.0, float("nan")], [0.0, float("inf")], [0.0, 70000.0]])
def test_an_unknown_range_is_refused(values: list[float]) -> None:
    with pytest.raises(PimergeError, match="the range of its grey levels is not known"):
        eight_bits(Image.fromarray(np.array([values], np.float32)))
