"""The arc between two updates: ΔW = (sin((1−t)Ω)·ΔW_1 + sin(tΩ)·ΔW_2)/sin Ω (Shoemake 1985, section 3.3).

Ω is the angle between the two updates of a module as vectors, and the weights are (1−t, t). The updates keep their
lengths, whereas Shoemake's vectors have unit length. If there is no unique arc, because an update is zero or the
updates are opposite (within 0.0014 of π), the result is on the straight line: (1−t)ΔW_1 + tΔW_2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pimerge.core.errors import PimergeError
from pimerge.merging.method import MergeMethod, Space

if TYPE_CHECKING:
    from torch import Tensor

OPPOSITE = -1 + 1e-6


def weights(count: int, given: Sequence[float] | None) -> list[float]:
    """Return (1−t, t), which is (0.5, 0.5) by default; (1) for a single expert.

    >>> weights(2, None)
    [0.5, 0.5]
    """
    if count > 2:
        raise PimergeError(f"'slerp' merges two experts; got {count}", "choose two, or use another method")
    found = [1 / count] * count if given is None else list(given)
    if abs(sum(found) - 1) > 1e-6:
        raise PimergeError(f"the weights of 'slerp' sum to {sum(found):g}", "expected 1 − t and t, such as 0.7,0.3")
    return found


def coefficients(weights: Tensor, *, inner: Tensor) -> Tensor:
    """Compute sin(w_n Ω)/sin Ω: (experts) → (experts), with ⟨ΔW_i, ΔW_j⟩ (experts, experts).

    >>> import torch
    >>> coefficients(torch.tensor([0.5, 0.5]), inner=torch.eye(2))
    tensor([0.7071, 0.7071])
    """
    import torch

    norms = inner.diagonal().sqrt()
    cosine = (inner[0, -1] / norms[0] / norms[-1]).clamp(-1, 1)
    if not cosine > OPPOSITE:  # also if a zero update makes it NaN
        return weights
    angle = cosine.acos() / torch.pi
    # sin(wΩ)/sin Ω by sinc, which has no pole at Ω = 0
    return weights * torch.sinc(weights * angle) / torch.sinc(angle)


METHOD = MergeMethod(
    name="slerp",
    summary="The arc between two updates.",
    formula="ΔW = (sin((1−t)Ω)·ΔW_1 + sin(tΩ)·ΔW_2)/sin Ω, with the angle Ω between the updates",
    paper="Shoemake 1985, section 3.3",
    space=Space.LINEAR,
    needs=("inner",),
    weights=weights,
    coefficients=coefficients,
)
