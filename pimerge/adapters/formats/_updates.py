"""ΔW of LyCORIS' modules, by its own formulas, in float64 as (d_out × d_in) with a kernel flattened into d_in.

Each function takes a reader of tensors and the slots of one module (slot → key). See LyCORIS (arXiv 2309.14859),
``lycoris/functional``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Read = Callable[[str], "Tensor"]
Keys = Mapping[str, str]


def tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σ_ij core_ij… left_ip right_jr, (p, r, *kernel): a convolution with a core, as ``rebuild_tucker`` computes it.

    Args:
        core: (i, j, *kernel).
        left: (i, p), of the outputs.
        right: (j, r), of the inputs.
    """
    import torch

    found: Tensor = torch.einsum("ij...,ip,jr->pr...", core, left, right)
    return found


def with_core(read: Read, keys: Keys) -> Tensor:
    """LoCon with a core (``lora_mid``): up (d_out, i, 1, 1), mid (i, j, *kernel), down (j, d_in, 1, 1)."""
    up, mid, down = (read(keys[slot]).double() for slot in ("B", "mid", "A"))
    return tucker(mid, up.flatten(1).T, down.flatten(1)).flatten(1)


def split(read: Read, keys: Keys) -> Tensor:
    """Rows in several parts, each with factors of its own, as sd-scripts trains fused q, k and v (``split_qkv``)."""
    import torch

    parts = range(len(keys) // 2)
    return torch.cat([read(keys[f"B.{part}"]).double() @ read(keys[f"A.{part}"]).double() for part in parts])


def hadamard(read: Read, keys: Keys) -> Tensor:
    """LoHa: (w1_a w1_b) ∘ (w2_a w2_b), each with a core ``hada_tN`` for some convolutions."""
    parts = []
    for number in (1, 2):
        a, b = (read(keys[f"hada_w{number}_{letter}"]).double() for letter in "ab")
        core = keys.get(f"hada_t{number}")
        parts.append(a @ b.flatten(1) if core is None else tucker(read(core).double(), a, b).flatten(1))
    return parts[0] * parts[1]


def kronecker(read: Read, keys: Keys) -> Tensor:
    """LoKr: w1 ⊗ w2, each whole or a product, w2 with a core ``lokr_t2`` for some convolutions."""
    import torch

    factors = []
    for number in (1, 2):
        name = f"lokr_w{number}"
        if name in keys:
            factors.append(read(keys[name]).double().flatten(1))
            continue
        a, b = (read(keys[f"{name}_{letter}"]).double() for letter in "ab")
        core = keys.get(f"lokr_t{number}")
        factors.append(a @ b.flatten(1) if core is None else tucker(read(core).double(), a, b).flatten(1))
    return torch.kron(*factors)


def whole(read: Read, keys: Keys) -> Tensor:
    """The update itself (``diff``, ``w_norm``, or ``diff_b`` alone); a vector becomes one column."""
    slot = next(slot for slot in ("diff", "w_norm", "diff_b", "b_norm") if slot in keys)
    tensor = read(keys[slot]).double()
    return tensor.reshape(len(tensor), -1)
