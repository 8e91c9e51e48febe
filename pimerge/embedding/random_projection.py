"""Random projections of large embeddings, to find the nearest of thousands of experts without reading their tensors.

Two transforms of Johnson–Lindenstrauss type, seeded by names, so that projections from different times are comparable:

- :func:`projection` restricts a layer's outputs or inputs to 64 random directions (to all of them if there are fewer);
- :func:`project` adds every number of an embedding, with a random sign, to one random place in each of four blocks of
  128 (sparse; Kane and Nelson, arXiv 1012.1577). The expected inner product of two projections is that of the
  embeddings a and b; its standard deviation is at most √(2/512) ≈ 0.063 of ‖a‖‖b‖ (0.044 for orthogonal ones).
  Rounding to eight bits adds about 0.005.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from pimerge.adapters.expert import Expert

DIRECTIONS = 64
BLOCKS, WIDTH = 4, 128
SIZE = BLOCKS * WIDTH
_LEVELS = 127


@lru_cache(maxsize=256)
def projection(name: str, size: int) -> Tensor:
    """Return orthonormal random directions as columns (size × min(64, size)), float32, the same for the same name.

    >>> projection("q.output", 2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    import torch

    if size <= DIRECTIONS:
        return torch.eye(size)
    drawn = torch.randn(size, DIRECTIONS, generator=_generator(name), dtype=torch.float64)
    columns: Tensor = torch.linalg.qr(drawn)[0]
    return columns.float()


def update_embedding(expert: Expert) -> dict[str, Tensor]:
    """Return module → ΔW in random directions of its outputs and inputs, (≤ 64 × ≤ 64).

    It is scaled so that its expected squared norm is that of ΔW. Inner products have a relative error of about 1/√64
    per module, which averages out over modules.
    """
    found = {}
    for name, module in expert.modules.items():
        factors = expert.factors(name)
        out, into = projection(f"{name}.output", module.d_out), projection(f"{name}.input", module.d_in)
        size = factors.scaling * (module.d_out / out.shape[1] * module.d_in / into.shape[1]) ** 0.5
        update = (out.T.double() @ factors.B.double()) @ (factors.A.double() @ into.double())
        found[name] = (size * update).float()
    return found


def project(embedding: Mapping[str, Tensor]) -> Tensor:
    """Project an embedding, given as name → part, to (512) float64.

    >>> import torch
    >>> a, b = torch.eye(2, dtype=torch.float64)
    >>> round(float(project({"q": a}) @ project({"q": a})), 6)
    1.0
    """
    import torch

    sums = torch.zeros(BLOCKS, WIDTH, dtype=torch.float64)
    for name, part in sorted(embedding.items()):
        values = part.double().flatten()
        generator = _generator(name)
        # one random integer per block gives the place (its value modulo 128) and the sign
        drawn = torch.randint(2 * WIDTH, (BLOCKS, len(values)), generator=generator, dtype=torch.int16)
        signs = (drawn >= WIDTH).double() * 2 - 1
        sums.scatter_add_(1, (drawn % WIDTH).long(), signs * values)
    scaled: Tensor = sums.flatten() / BLOCKS**0.5
    return scaled


def to_text(values: Tensor) -> str:
    """Encode a projection in 688 characters of base64: its largest magnitude as float32, then eight bits per number."""
    import torch

    largest = values.abs().max().float()
    levels = (values / torch.where(largest > 0, largest, 1.0) * _LEVELS).round().to(torch.int8)
    return base64.b64encode(largest.numpy().astype("<f4").tobytes() + levels.numpy().tobytes()).decode()


def from_texts(texts: Sequence[str]) -> NDArray[np.float32]:
    """Decode projections that :func:`to_text` wrote, (n × 512).

    >>> import torch
    >>> values = torch.linspace(-1, 1, SIZE)
    >>> bool((torch.from_numpy(from_texts([to_text(values)]))[0] - values).abs().max() < 0.005)
    True
    """
    rows = np.frombuffer(b"".join(map(base64.b64decode, texts)), np.uint8).reshape(len(texts), 4 + SIZE)
    largest = rows[:, :4].copy().view("<f4")
    levels = rows[:, 4:].copy().view(np.int8).astype(np.float32)
    levels *= largest / _LEVELS
    return levels


def _generator(name: str) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(int.from_bytes(sha256(name.encode()).digest()[:7]))
