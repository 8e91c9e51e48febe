"""Convert DoRA, PiSSA, OLoRA and KaSA to a ΔW of the published base, which depends on the base's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from pimerge.adapters.computed_module import ComputedModule
from pimerge.adapters.expert import Expert
from pimerge.adapters.lora_module import DORA, KASA, OLORA, PISSA, Factors, LoraModule

if TYPE_CHECKING:
    from torch import Tensor

F64 = torch.float64


def converting(weight_of: Callable[[str], Tensor]) -> Callable[[Expert, str], Factors]:
    """A reader of experts' factors that converts modules that are not plain LoRA.

    Args:
        weight_of: module → the base's weight, (d_out × d_in).
    """

    def read(expert: Expert, name: str) -> Factors:
        module = expert.modules[name]
        if not module.conversions:
            return expert.factors(name)
        if isinstance(module, ComputedModule):
            return module.factors(expert.tensor, weight_of(name))
        factors = expert.factors(name)
        magnitude = expert.tensor(module.magnitude) if module.magnitude else None
        return converted(module, factors, weight_of(name), magnitude)

    return read


def converted(module: LoraModule, factors: Factors, weight: Tensor, magnitude: Tensor | None) -> Factors:
    """ΔW relative to the base's weight W0 (d_out × d_in, or with a kernel), as factors with scaling 1, in float64.

    - PiSSA (arXiv 2404.02948) moves the r leading singular triples of W0 into the factors and leaves W0 − top_r(W0) in
      the base: ΔW = s·BA − top_r(W0).
    - OLoRA (arXiv 2406.01775) does the same with the first r columns of Q and rows of R of W0 = QR, times s.
    - KaSA (arXiv 2412.06071) drops the r smallest singular triples of W0: ΔW = s·BA − bottom_r(W0).
    - DoRA (arXiv 2402.09353) has W = m ∘ (W' + s·BA) / ‖W' + s·BA‖ by rows, where W' is W0 or the remainder of PiSSA or
      OLoRA: ΔW = W − W0, of full rank.

    Args:
        magnitude: m, of d_out entries; None without DoRA.

    >>> module = LoraModule("q", "", "", None, 1, 1.0, 1.0, "linear", (1, 2), (2, 1), None, ("PiSSA",))
    >>> W = torch.diag(torch.tensor([3.0, 1.0]))
    >>> found = converted(module, Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[5.0], [0.0]]), 1.0), W, None)
    >>> (found.B @ found.A).round(decimals=6).tolist()  # the 3 was in the factors, which now hold a 5
    [[2.0, 0.0], [0.0, 0.0]]
    """
    W0, A, B = weight.to(F64).flatten(1), factors.A.to(F64), factors.scaling * factors.B.to(F64)
    rank = len(A)
    if PISSA in module.conversions:
        left, singular, right = torch.linalg.svd(W0, full_matrices=False)
        A, B = torch.cat([A, right[:rank]]), torch.cat([B, -left[:, :rank] * singular[:rank]], 1)
    elif OLORA in module.conversions:
        Q, R = torch.linalg.qr(W0)
        A, B = torch.cat([A, R[:rank]]), torch.cat([B, -factors.scaling * Q[:, :rank]], 1)
    elif KASA in module.conversions:
        left, singular, right = torch.linalg.svd(W0, full_matrices=False)
        A, B = torch.cat([A, right[-rank:]]), torch.cat([B, -left[:, -rank:] * singular[-rank:]], 1)
    if DORA in module.conversions:
        assert magnitude is not None
        W = W0 + B @ A
        norms = torch.linalg.vector_norm(W, dim=1)
        delta = (magnitude.to(F64).reshape(-1) / norms)[:, None] * W - W0
        rows, columns = delta.shape
        A, B = (delta, torch.eye(rows, dtype=F64)) if rows <= columns else (torch.eye(columns, dtype=F64), delta)
    return Factors(A, B, 1.0, None if factors.bias is None else factors.scaling * factors.bias)
