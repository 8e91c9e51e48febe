"""Drop and rescale entries at random, as in DARE (arXiv 2311.03099) and DELLA (arXiv 2406.11617).

An entry is kept if a random 16-bit word is below round(65536·p), which is several times faster than torch.bernoulli.
Kept entries are divided by round(65536·p)/65536, so that the expectation is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

WORDS = 1 << 16
BREAKS = dict.fromkeys(
    ("identity", "copies"), "entries are dropped at random; it holds in expectation, and at --density 1"
)


def drop(deltas: Tensor, density: float, generators: Sequence[Generator]) -> Tensor:
    """Keep each entry with probability ``density`` and divide it by that: (experts, *shape) → (experts, *shape).

    Args:
        generators: one per expert, on the CPU, so that the random numbers of an expert depend neither on the other
            experts nor on the device.

    >>> import torch
    >>> drop(torch.ones(1, 6), 0.5, [torch.Generator().manual_seed(0)]).unique()
    tensor([0., 2.])
    """
    import torch

    chance = torch.tensor([density], dtype=torch.float64, device=deltas.device)
    return torch.stack([keep(delta, chance, g) for delta, g in zip(deltas, generators, strict=True)])


def keep(delta: Tensor, chance: Tensor, generator: Generator) -> Tensor:
    """Keep each entry with its own probability, and divide it by that.

    Args:
        chance: probabilities in (0, 1], float64, of at least one dimension; broadcast to the shape of ``delta``.
    """
    levels = (WORDS * chance).round().clamp(min=1)
    kept = _words(delta, generator) <= (levels - WORDS // 2 - 1).short()
    return delta * (WORDS / levels).to(delta.dtype) * kept


def _words(like: Tensor, generator: Generator) -> Tensor:
    """Return uniform int16 numbers of the shape of ``like``, four for each random 64-bit number."""
    import torch

    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
    return draws.view(torch.int16)[: like.numel()].view(like.shape).to(like.device)
