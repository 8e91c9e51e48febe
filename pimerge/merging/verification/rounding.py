"""How far rounding may move a weight that was written in some dtype."""

from __future__ import annotations

import torch
from torch import Tensor

ARITHMETIC = 1e-5
"""Relative error that float32 arithmetic may add to the sum of the updates."""
_NARROW = (torch.bfloat16, torch.float16)
_FEW = 16  # so many numbers can have few digits by chance


def precision_of(values: Tensor) -> torch.dtype:
    """The narrowest dtype that holds these numbers: a merge in bfloat16 can be stored as float32.

    >>> precision_of(torch.linspace(0, 1, 99)), precision_of(torch.linspace(0, 1, 99).bfloat16().float())
    (torch.float32, torch.bfloat16)
    """
    if values.dtype in _NARROW or values.numel() < _FEW:
        return values.dtype
    return next((kind for kind in _NARROW if torch.equal(values.to(kind).to(values.dtype), values)), values.dtype)


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of a dtype at each value (one unit in the last place), in float64.

    >>> spacing(torch.tensor([1.0, 3.0]), torch.bfloat16).tolist()
    [0.0078125, 0.015625]
    """
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().double().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps, dtype=torch.float64), exponent - 1)


def arithmetic_error(dtype: torch.dtype) -> float:
    """Relative error of a sum of products that was computed and stored in a dtype, or in float32 if that is wider."""
    return max(2 * torch.finfo(dtype).eps, ARITHMETIC)
