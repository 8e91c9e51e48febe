"""Drop and rescale, the step of DARE (arXiv 2311.03099) and of DELLA (arXiv 2406.11617).

Whether an entry is kept is decided by a random word of 16 bits below a threshold of round(65536·p), several times
faster than torch.bernoulli. What is kept is divided by threshold/65536, so that the expectation is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

WORDS = 1 << 16
BREAKS = {
    "identity": "entries are dropped at random; it holds in expectation, and at --density 1",
    "copies": "entries are dropped at random; it holds in expectation, and at --density 1",
}


def drop(deltas: Tensor, density: float, generators: Sequence[Generator]) -> Tensor:
    """Each entry divided by the density with that probability, else 0: (experts, *shape) → (experts, *shape).

    Args:
        generators: one per expert, on the CPU, so that an expert's draws depend neither on the others nor on
            the device.

    >>> import torch
    >>> drop(torch.ones(1, 6), 0.5, [torch.Generator().manual_seed(0)]).unique()
    tensor([0., 2.])
    """
    import torch

    chance = torch.tensor([density], dtype=torch.float64, device=deltas.device)
    return torch.stack([keep(delta, chance, g) for delta, g in zip(deltas, generators, strict=True)])


def keep(delta: Tensor, chance: Tensor, generator: Generator) -> Tensor:
    """Each entry divided by its chance with that probability, else 0.

    Args:
        chance: in (0, 1], float64, broadcast to the shape of ``delta``; at least one dimension.
    """
    levels = (WORDS * chance).round().clamp(min=1)
    kept = _words(delta, generator) <= (levels - WORDS // 2 - 1).short()
    return delta * (WORDS / levels).to(delta.dtype) * kept


def _words(like: Tensor, generator: Generator) -> Tensor:
    """Uniform int16 of the shape of ``like``, four from each draw of 64 bits."""
    import torch

    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
    return draws.view(torch.int16)[: like.numel()].view(like.shape).to(like.device)
