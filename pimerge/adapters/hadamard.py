"""Updates ΔW = s·B A written as a LoHa, which fits a convolution whether or not its channels are divided into groups.

LoHa has ΔW = s · (B₁ A₁) ⊙ (B₂ A₂) in the shape of the stored weight (arXiv 2108.06098). With B₂ A₂ = 1, a matrix of
ones of rank 1, ΔW = s·B₁ A₁ is exact. PEFT's LoRA of a convolution in groups holds no such update: its A reads all
channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pimerge.adapters.keys import PREFIX
from pimerge.adapters.lora_module import LoraModule
from pimerge.adapters.merged_module import MergedModule

if TYPE_CHECKING:
    from torch import Tensor

_SLOTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LAYERS = ("linear", "conv")
_KEPT = """r rank_pattern alpha_pattern target_modules task_type auto_mapping revision base_model_name_or_path
    inference_mode modules_to_save""".split()  # noqa: SIM905


class HadamardPacking:
    """Turns merged modules into the tensors of a LoHa, one after the other."""

    def __init__(self, modules: Sequence[LoraModule]) -> None:
        self.keys = [f"{PREFIX}{module.name}.{slot}" for module in modules for slot in _SLOTS]

    def add(self, merged: MergedModule) -> dict[str, Tensor]:
        """The tensors of a module: B (d_out × r), A (r × d_in), and a matrix of ones as factors of the same shapes."""
        A, B = merged.factors.A.contiguous(), merged.factors.B.contiguous()
        ones_A, ones_B = A.new_zeros(A.shape), B.new_zeros(B.shape)
        ones_A[0], ones_B[:, 0] = 1, 1
        found = dict(zip(_SLOTS, (B, A, ones_B, ones_A), strict=True))
        return {f"{PREFIX}{merged.module.name}.{slot}": tensor for slot, tensor in found.items()}


def fits_hadamard(modules: Sequence[LoraModule], has_bias: bool, fan_in_fan_out: bool) -> bool:
    """Whether PEFT's LoHa has all of these modules."""
    kernels = {len(module.shape_A) - 2 for module in modules}
    plain = all(module.layer in _LAYERS and module.parameter is None for module in modules)
    return plain and not has_bias and not fan_in_fan_out and max(kernels, default=0) <= 2


def hadamard_fields(lora: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a LoHa with the modules, ranks and scalings of a LoRA's config.

    >>> hadamard_fields({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_rslora": False})["alpha"]
    3
    """
    kept = {name: lora[name] for name in _KEPT if name in lora}
    own = {"use_effective_conv2d": False, "rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True}
    return {"peft_type": "LOHA", "alpha": lora["lora_alpha"], **kept, **own}
