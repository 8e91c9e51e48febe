"""Random projections that all layers of an expert share: in its file, or drawn again from a key as PEFT draws them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pimerge.adapters.kinds import _relatives
from pimerge.adapters.kinds._relatives import Read
from pimerge.core.errors import Problems

if TYPE_CHECKING:
    from torch import Tensor

Projections = Callable[[Read], "tuple[Tensor, Tensor]"]
"""What reads or draws A and B."""


def split_projections(
    kind: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The keys of the projections in a file, and the shapes of its other tensors.

    PEFT may write the same two matrices for every layer once more.

    >>> split_projections("vera", {"base_model.vera_A": (2, 8), "base_model.model.q.vera_A": (2, 8), "x": (1,)})
    ({'A': 'base_model.vera_A'}, {'x': (1,)})
    """
    every = re.compile(rf"base_model\.(?:model\.(?:.+\.)?)?{kind}_[AB]")
    stored = {letter: key for letter in "AB" if (key := f"base_model.{kind}_{letter}") in shapes}
    return stored, {key: shape for key, shape in shapes.items() if not every.fullmatch(key)}


def check_projections(
    stored: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    problems: Problems,
) -> None:
    """Note what is wrong with projections in a file: one of the two is missing, or a shape differs."""
    for letter in sorted(wanted.keys() - stored.keys()):
        problems.add(f"the projection {letter} is not in the file, the other one is", "save the adapter again")
    for letter, key in stored.items():
        if shapes[key] != wanted[letter]:
            problems.add(
                f"{key} is {shapes[key]}, expected {wanted[letter]} for the largest layers of the base",
                "the expert was trained on another base: pass its own with --base",
            )


def from_file_or_drawn(stored: Mapping[str, str], draw: Callable[[], tuple[Tensor, Tensor]]) -> Projections:
    """What reads the projections where they are in the file, and draws them elsewhere."""
    return lambda read: (read(stored["A"]), read(stored["B"])) if stored else draw()


def fresh_fields(size: int | None, modules: Sequence[str] | None) -> dict[str, Any]:
    """What PEFT's config says of a fresh expert; its projections can be drawn again, so they are not saved.

    >>> fresh_fields(4, None)
    {'init_weights': True, 'r': 4, 'save_projection': False}
    """
    return _relatives.fresh_fields(size, modules) | {"save_projection": False}


@lru_cache(maxsize=2)
def drawn_by_peft(tuner: str, rank: int, d_out: int, d_in: int, **fields: object) -> tuple[Tensor, Tensor]:
    """The projections that PEFT draws for a single layer of a shape, which are those for layers up to that.

    Args:
        tuner: PEFT's name: ``Vera`` or ``RandLora``.
        fields: of the config, that decide the draw.
    """
    import peft
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        layer = nn.utils.skip_init(nn.Linear, d_in, d_out)  # type: ignore[no-untyped-call]
        config = getattr(peft, f"{tuner}Config")(r=rank, target_modules=["0"], save_projection=True, **fields)
        model = getattr(peft, f"{tuner}Model")(nn.Sequential(layer), config, "default")
    return tuple(getattr(model, f"{tuner.lower()}_{letter}")["default"] for letter in "AB")
