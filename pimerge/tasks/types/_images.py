"""Decode images, and cache processed images for the next epoch."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError
from pimerge.tasks.row_errors import RowProblems
from pimerge.tasks.types._grey_levels import eight_bits

if TYPE_CHECKING:
    from pimerge.tasks.examples import Batch, Rows

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_KEPT_BYTES = 256 * 2**20


def mode_of(config: Any) -> str:
    """The colour mode of a model's images, by its number of channels.

    >>> from types import SimpleNamespace
    >>> mode_of(SimpleNamespace(num_channels=1)), mode_of(SimpleNamespace())
    ('L', 'RGB')
    """
    return _MODES[getattr(config, "num_channels", getattr(config, "in_channels", 3))]


def decoder(rows: Rows, mode: str) -> Callable[[int], Any]:
    """Make a function that decodes the image of a row by its position, or raises a PimergeError."""
    images = rows.table[rows.columns["image"]]

    def decode(place: int) -> Any:
        try:
            image = images[place]
            if hasattr(image, "convert"):
                return eight_bits(image).convert(mode)
        except PimergeError:
            raise
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise PimergeError(
                f"there is no image '{error.filename}'",
                "paths are relative to the data file: fix it or leave the row out",
            ) from error
        except Exception as error:  # Pillow raises many types of errors for broken files
            reason = str(error).partition(" <_io")[0]  # without the address of Pillow's buffer
            raise PimergeError(f"the image cannot be decoded: {reason}", "fix the file or leave the row out") from error
        raise PimergeError(
            f"the column '{rows.columns['image']}' holds no image, but {repr(image)[:60]}",
            "use a column of paths, parquet with a column of images, or a folder of images with a metadata.jsonl",
        )

    return decode


def tell_broken(rows: Rows, decode: Callable[[int], Any]) -> None:
    """Decode every image of a split, and raise the problems of all rows at once."""
    problems = RowProblems(rows.where, rows.numbers)
    for place in range(len(rows.labels)):
        with problems.row(place):
            decode(place)
    problems.raise_any()


def have_heads(rows: Rows) -> bool:
    """Whether all files have the header of an image, without decoding them."""
    import datasets
    from PIL import Image

    column = rows.columns["image"]
    if not isinstance(rows.table.features[column], datasets.Image):
        return False
    try:
        for file in rows.table.cast_column(column, datasets.Image(decode=False))[column]:
            with Image.open(BytesIO(file["bytes"]) if file["bytes"] is not None else file["path"]):
                pass
    except Exception:  # Pillow raises many types of errors for broken files
        return False
    return True


def remembered(compute: Callable[[int], Batch]) -> Callable[[int], Batch]:
    """Cache a function of a position: the first 256 MB of results are kept, others are computed each time."""
    kept: dict[int, Batch] = {}
    free = _KEPT_BYTES

    def get(place: int) -> Batch:
        nonlocal free
        if place in kept:
            return kept[place]
        found = compute(place)
        size = sum(value.nbytes for value in found.values())
        if size <= free:
            kept[place] = found
            free -= size
        return found

    return get
