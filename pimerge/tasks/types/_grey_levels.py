"""Images with more than 8 bits per pixel, scaled to 8 bits by the range of their values.

Pillow cuts such values off at 255 when it converts them, which leaves black and white.
"""

from __future__ import annotations

from typing import Any

from pimerge.core.errors import PimergeError

_BITS_PER_SAMPLE = 258  # tag of TIFF
_RANGES = (1.0, 255.0, 65535.0)


def eight_bits(image: Any) -> Any:
    """A grey image with 8 bits per pixel; any other image is returned unchanged.

    16-bit images have the range of their bits (0 to 65535, or 4095 for 12 bits). 32-bit integers have the range 0 to
    255 or 0 to 65535 and floating-point values also 0 to 1, whichever is the least that holds all values of the image.

    >>> from PIL import Image
    >>> [eight_bits(Image.new("I;16", (1, 1), value)).getpixel((0, 0)) for value in (0, 257, 65535)]
    [0, 1, 255]
    >>> eight_bits(Image.new("F", (1, 1), 0.6)).getpixel((0, 0))
    153
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    import numpy
    from PIL import Image

    values = numpy.asarray(image).astype(numpy.float64)
    if image.mode.startswith("I;"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        most = float(2**bits - 1)
    else:
        most = _range_of(values, _RANGES if image.mode == "F" else _RANGES[1:])
    return Image.fromarray(numpy.rint(values * (255 / most)).clip(0, 255).astype(numpy.uint8))


def _range_of(values: Any, ranges: tuple[float, ...]) -> float:
    low, high = float(values.min()), float(values.max())
    if low >= 0:  # not so for NaN
        for most in ranges:
            if high <= most:
                return most
    known = ", ".join(f"0 to {most:g}" for most in ranges)
    raise PimergeError(
        f"the image has values from {low:g} to {high:g}, and the range of its grey levels is not known",
        f"save it with 8 or 16 bits, or scale it to one of {known}",
    )
