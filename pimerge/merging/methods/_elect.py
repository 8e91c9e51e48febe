"""Sign election and disjoint mean, the second and third step of TIES (arXiv 2306.01708, section 3)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def elected_mean(deltas: Tensor, weights: Tensor) -> Tensor:
    """Mean of the entries whose sign agrees with the sign of the sum: (experts, *shape), (experts) → (*shape).

    Per entry, γ = sign(Σ w_n t_n), with + for 0, and the result is Σ w_n t_n / Σ |w_n| over the n for which
    w_n t_n has sign γ; 0 where there is none. Only the ratios of the weights matter. A negative weight stands
    for the negated expert.

    >>> elected_mean(torch.tensor([[4.0, -1.0, 0.0], [2.0, 3.0, 0.0]]), torch.tensor([0.5, 0.5]))
    tensor([3., 3., 0.])
    """
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
