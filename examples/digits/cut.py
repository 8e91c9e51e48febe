"""Cut tasks from the scans in this folder: a look and a question, on chosen parts of ``data/digits.parquet``.

    python examples/digits/cut.py FOLDER NAME:LOOK:QUESTION:PARTS ...

    LOOK      plain, inverted, rotated, outlined or noisy; with several, such as inverted+rotated, every scan has each
    QUESTION  parity, loop, or which of these digits, such as 0-4
    PARTS     training parts: train, few or draws, or several, such as few+draws

``FOLDER/NAME`` gets ``task.json``, ``train.parquet`` and ``test.parquet``, which is always the part ``test``. make.py
explains the parts, and cuts the tasks of the pool with the same functions.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageChops, ImageFilter, ImageOps

SCANS = Path(__file__).parent / "data" / "digits.parquet"
ATTRIBUTION = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak (1998), UCI Machine Learning Repository, "
    "https://doi.org/10.24432/C50P49, CC BY 4.0; 8 x 8 scans as scikit-learn's load_digits bundles them"
)

Transform = Callable[[PILImage.Image, int], PILImage.Image]


def plain(image: PILImage.Image, number: int) -> PILImage.Image:
    """The unchanged scan: white strokes on black."""
    return image


def inverted(image: PILImage.Image, number: int) -> PILImage.Image:
    """Black strokes on white."""
    return ImageOps.invert(image)


def rotated(image: PILImage.Image, number: int) -> PILImage.Image:
    """A quarter turn."""
    return image.transpose(PILImage.Transpose.ROTATE_90)


def outlined(image: PILImage.Image, number: int) -> PILImage.Image:
    """The edges of the strokes: the brightest minus the darkest neighbour."""
    return ImageChops.subtract(image.filter(ImageFilter.MaxFilter(3)), image.filter(ImageFilter.MinFilter(3)))


def noisy(image: PILImage.Image, number: int) -> PILImage.Image:
    """Gaussian noise of a quarter of the range, seeded by the scan's number."""
    noise = np.random.default_rng(number).normal(0, 64, (8, 8))
    return PILImage.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


LOOKS: dict[str, Transform] = {look.__name__: look for look in (plain, inverted, rotated, outlined, noisy)}

Question = tuple[list[str], Mapping[int, int]]


def which(*digits: int) -> Question:
    """Which of these digits?"""
    return [str(digit) for digit in digits], {digit: index for index, digit in enumerate(digits)}


PARITY: Question = (["even", "odd"], {digit: digit % 2 for digit in range(10)})
LOOP: Question = (["no loop", "loop"], {digit: int(digit in (0, 6, 8, 9)) for digit in range(10)})


def _several(names: str) -> str:
    return rf"(?:{names})(?:\+(?:{names}))*"


TASK = re.compile(rf"[\w.-]+:{_several('|'.join(LOOKS))}:(?:parity|loop|[0-9]-[0-9]):{_several('train|few|draws')}")


def main() -> None:
    """Cut the tasks that the command names."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    if wrong := [task for task in sys.argv[2:] if not TASK.fullmatch(task)]:
        sys.exit(f"{', '.join(wrong)}: expected NAME:LOOK:QUESTION:PARTS\n\n{__doc__}")
    table = pq.read_table(SCANS)
    images = [PILImage.open(io.BytesIO(cell["bytes"])) for cell in table["image"].to_pylist()]
    digits, parts = np.array(table["label"]), table["part"].to_pylist()
    for task in sys.argv[2:]:
        name, looks, asked, used = task.split(":")
        transforms = [LOOKS[look] for look in looks.split("+")]
        write_task(folder / name, images, digits, transforms, question(asked), parts, {"train": used.split("+")})


def question(text: str) -> Question:
    """``parity``, ``loop``, or which of the digits of a range.

    >>> question("3-5")
    (['3', '4', '5'], {3: 0, 4: 1, 5: 2})
    """
    if text in ("parity", "loop"):
        return {"parity": PARITY, "loop": LOOP}[text]
    first, last = map(int, text.split("-"))
    return which(*range(first, last + 1))


def write_rows(
    path: Path,
    images: Sequence[PILImage.Image],
    labels: Sequence[int],
    numbers: Sequence[int],
    parts: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """A parquet file with an Image feature; ``number`` is its index in load_digits, ``part`` its part.

    Args:
        names: names of the classes that the labels are indices of; by default the labels are digits.
    """
    label = ClassLabel(names=list(names)) if names else Value("int64")
    features = Features({"image": Image(), "label": label, "number": Value("int64")})
    rows = {
        "image": [{"bytes": png(image), "path": None} for image in images],
        "label": list(labels),
        "number": list(numbers),
    }
    if parts is not None:
        features["part"] = Value("string")
        rows["part"] = list(parts)
    table = pa.table(rows, schema=features.arrow_schema)
    table = table.replace_schema_metadata({**table.schema.metadata, b"attribution": ATTRIBUTION.encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", compression_level=19, use_dictionary=False)


def png(image: PILImage.Image) -> bytes:
    """An image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_task(
    folder: Path,
    images: Sequence[PILImage.Image],
    digits: np.ndarray,
    transforms: Sequence[Transform],
    question: Question,
    parts: Sequence[str],
    splits: Mapping[str, Sequence[str]],
) -> None:
    """Write ``task.json`` and a parquet file per split, from the parts in ``splits``; ``test`` is always written."""
    labels, answer = question
    for split, used in {**splits, "test": ["test"]}.items():
        chosen = [i for i, digit in enumerate(digits) if parts[i] in used and int(digit) in answer]
        changed = [transform(images[i], i) for transform in transforms for i in chosen]
        answers = [answer[int(digits[i])] for i in chosen]
        rows = (changed, answers * len(transforms), chosen * len(transforms))
        write_rows(folder / f"{split}.parquet", *rows, names=labels)
    document = {
        "type": "image-classification",
        "data": {split: f"{split}.parquet" for split in [*splits, "test"]},
        "labels": labels,
        "description": f"{' and '.join(transform.__name__ for transform in transforms)} scans of digits",
    }
    (folder / "task.json").write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
