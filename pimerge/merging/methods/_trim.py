"""The steps of TIES (arXiv 2306.01708, section 3): trim, elect signs, average the entries that agree.

The number of kept entries is exact. Equal magnitudes at the threshold are common in bfloat16, and keeping all of them
would change the result, so the first ones in row-major order are kept. Merging runs on the CPU, where selection and
comparison are several times faster in numpy than in torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BREAKS = dict.fromkeys(("identity", "copies"), "the smallest entries are trimmed; it holds at --density 1")


def kept_count(density: float, size: int) -> int:
    """Return the number of entries to keep: ``density`` · ``size``, rounded down, at least 1.

    >>> kept_count(0.2, 9), kept_count(0.2, 1)
    (1, 1)
    """
    return max(1, int(density * size))


def largest(delta: Tensor, count: int) -> Tensor:
    """Return a mask of the ``count`` entries with the largest magnitudes: (*shape) → bool (*shape).

    >>> import torch
    >>> largest(torch.tensor([[1.0, -3.0], [3.0, 3.0]]), 2)
    tensor([[False,  True],
            [ True, False]])
    """
    import numpy as np
    import torch

    magnitude = np.abs(delta.numpy()).ravel()
    threshold = np.partition(magnitude, -count)[-count]
    mask = magnitude >= threshold
    surplus = np.count_nonzero(mask) - count
    if surplus:
        mask[np.flatnonzero(magnitude == threshold)[-surplus:]] = False
    return torch.from_numpy(mask).view(delta.shape)


def trim(deltas: Tensor, density: float) -> Tensor:
    """Set all but the largest entries of each expert to 0: (experts, *shape) → (experts, *shape).

    >>> import torch
    >>> trim(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), density=0.5)
    tensor([[ 0., -3.,  2.,  0.]])
    """
    import numpy as np
    import torch

    trimmed = torch.empty_like(deltas)
    for delta, out in zip(deltas, trimmed, strict=True):
        np.multiply(delta.numpy(), largest(delta, kept_count(density, delta.numel())).numpy(), out=out.numpy())
    return trimmed


def elected_mean(deltas: Tensor, weights: Tensor) -> Tensor:
    """Average the entries that have the sign of the weighted sum: (experts, *shape), (experts) → (*shape).

    Per entry, γ = sign(Σ w_n t_n), with + for 0. The result is Σ w_n t_n / Σ |w_n| over the n for which w_n t_n has
    the sign γ, or 0 if there is none. Only the ratios of the weights matter. A negative weight negates the expert.

    >>> import torch
    >>> elected_mean(torch.tensor([[4.0, -1.0, 0.0], [2.0, 3.0, 0.0]]), torch.tensor([0.5, 0.5]))
    tensor([3., 3., 0.])
    """
    import numpy as np
    import torch

    values, shares = deltas.numpy(), weights.numpy().astype(deltas.numpy().dtype)
    sign = np.where(np.tensordot(shares, values, 1) >= 0, 1, -1).astype(values.dtype)
    total, mass = np.zeros_like(sign), np.zeros_like(sign)
    agreeing = np.empty_like(sign)
    for delta, share in zip(values, shares, strict=True):  # numpy in place: several times faster than torch here
        np.multiply(delta, sign, out=agreeing)
        agreeing *= share
        np.maximum(agreeing, 0, out=agreeing)
        total += agreeing
        np.multiply(agreeing > 0, abs(share), out=agreeing)
        mass += agreeing
    np.divide(total, mass, out=total, where=mass > 0)
    return torch.from_numpy(sign * total)
