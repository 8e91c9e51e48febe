"""Plots, one file each: where the data comes from, what the data is, how it is drawn.

A file of this folder has

- ``NEEDS``: what it is made of, ``store``, ``study``, ``path``, ``comparison`` or ``tuned``;
- ``OPTIONS``: the options of ``pimerge plot`` that mean something to it besides those of what it needs;
- ``Data``: a pydantic model, which is the JSON document, with ``figure`` as its name;
- ``collect(source, options)``: what it needs → its data;
- ``draw(data)``: its data → a matplotlib figure. Matplotlib is imported by what draws, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pimerge.core.progress import Track, silent


@dataclass(frozen=True)
class Options:
    """The options of ``pimerge plot`` by their names there.

    Attributes:
        experts: those that were named.
        track: told of the progress.
        note: told what the user should know, a sentence at a time.
    """

    experts: tuple[str, ...] = ()
    measure: str = "fisher"
    step: float = 0.05
    grid: int = 15
    coefficients: tuple[Path, ...] = ()
    k: int | None = None
    shots: str | None = None
    limit: int = 500
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    track: Track = silent
    note: Callable[[str], None] = lambda message: None
