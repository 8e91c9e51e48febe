"""Variants of LoRA that store their factors in another form than A (r × d_in) and B (d_out × r)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pimerge.adapters.lora_module import Factors, LoraModule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VariantModule(LoraModule):
    """The update of one module, whose ``shape_A`` and ``shape_B`` are those of its factors.

    Attributes:
        diagonal: key of KaSA's singular values (arXiv 2412.06071): ΔW = s · B diag(d) A; None for other variants.
        group: inputs that QA-LoRA (arXiv 2309.14717) averages before A; column i of the factor A is column i // group
            of the tensor.
        blocks_A, blocks_B: number of blocks on the diagonal of a factor, of which BD-LoRA stores the blocks below each
            other.
    """

    is_plain: ClassVar[bool] = False
    diagonal: str | None = None
    group: int = 1
    blocks_A: int = 1
    blocks_B: int = 1

    @property
    def key_of_slot(self) -> Mapping[str, str]:
        """Slot → key of each of its tensors."""
        return {**super().key_of_slot, **({"diag": self.diagonal} if self.diagonal else {})}

    def factors(self, read: Callable[[str], Tensor]) -> Factors:
        """Read its factors in the common layout; ``read`` reads the tensor of a key."""
        A, B = _block_diagonal(read(self.A), self.blocks_A), _block_diagonal(read(self.B), self.blocks_B)
        if self.group > 1:
            A = A.repeat_interleave(self.group, dim=1)
        if self.diagonal is not None:
            B = B.float() * read(self.diagonal).float()  # a product in 16 bits would be rounded
        return Factors(A, B, self.scaling, read(self.bias) if self.bias else None)


def _block_diagonal(stacked: Tensor, blocks: int) -> Tensor:
    """The matrix with these blocks on its diagonal; the blocks are stored below each other."""
    import torch

    if blocks == 1:
        return stacked
    found: Tensor = torch.block_diag(*stacked.chunk(blocks))  # type: ignore[no-untyped-call]
    return found
