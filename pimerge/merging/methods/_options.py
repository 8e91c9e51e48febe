"""Options that several merge methods share, with a default for each method."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from pimerge.core.plugins import Option

SHARE = "above 0 and at most 1"


class InnerMethod(StrEnum):
    """The method that merges updates after they have been aligned."""

    TIES = "ties"
    LINEAR = "linear"
    TSV = "tsv"
    ISO_C = "iso-c"


def is_share(value: float) -> bool:
    """Whether 0 < value ≤ 1."""
    return 0 < value <= 1


SCALE = Option("scale", float, "Factor of the merged update.")
DENSITY = Option("density", float, "Share of entries kept.", is_share, SHARE)
INNER = Option("inner_method", InnerMethod, "Method that merges the aligned updates.", typed="inner")


def options_of(function: Callable[..., Any], *options: Option) -> dict[Option, Any]:
    """Return option → default, which is the default of the function's keyword argument.

    >>> def merge(deltas, weights, *, density=0.2): ...
    >>> [(option.flag, default) for option, default in options_of(merge, DENSITY).items()]
    [('--density', 0.2)]
    """
    defaults: dict[str, Any] = function.__kwdefaults__ or {}
    return {option: defaults[option.name] for option in options}
