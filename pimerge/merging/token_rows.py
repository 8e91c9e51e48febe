"""Updates of a module whose vocabulary has several sizes, split at these sizes.

ΔW has one row (output layers) or one column (embeddings) for each token. The tokens that all experts have are merged by
the method. The tokens that only some have get the weighted mean of their updates, so that what one expert has alone is
copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from pimerge.adapters.lora_module import Factors


@dataclass(frozen=True)
class TokenRows:
    """The updates of a module.

    Attributes:
        parts: each expert's update, with as many tokens as it has.
        sizes: number of tokens that each expert has.
        axis: the axis of ΔW (d_out × d_in) that has the tokens.
    """

    parts: Sequence[Factors]
    sizes: Sequence[int]
    axis: int

    @property
    def common(self) -> list[Factors]:
        """The updates of the tokens that all experts have."""
        return [self._of(part, 0, min(self.sizes)) for part in self.parts]

    def rest(self, weights: Sequence[float]) -> list[Factors]:
        """Updates that sum to the mean update of the other tokens, for all tokens."""
        found = []
        for start, stop in pairwise(sorted(set(self.sizes))):
            holders = [(part, w) for part, w, size in zip(self.parts, weights, self.sizes, strict=True) if size >= stop]
            total = sum(w for _, w in holders)
            shares = [w / total for _, w in holders] if total else [1.0, *[0.0] * (len(holders) - 1)]
            for (part, _), share in zip(holders, shares, strict=True):
                own = self._of(part, start, stop)
                found.append(self.placed(replace(own, scaling=share * own.scaling), start))
        return found

    def placed(self, part: Factors, start: int) -> Factors:
        """An update of some tokens as one of all, which is zero elsewhere."""

        def at(tensor: Tensor, dim: int) -> Tensor:
            shape = list(tensor.shape)
            shape[dim] = max(self.sizes)
            whole = tensor.new_zeros(shape)
            whole.narrow(dim, start, tensor.shape[dim]).copy_(tensor)
            return whole

        if self.axis == 1:
            return replace(part, A=at(part.A, 1))
        return replace(part, B=at(part.B, 0), bias=None if part.bias is None else at(part.bias, 0))

    def _of(self, part: Factors, start: int, stop: int) -> Factors:
        """The update of some tokens."""
        if self.axis == 1:
            return replace(part, A=part.A[:, start:stop])
        return replace(part, B=part.B[start:stop], bias=None if part.bias is None else part.bias[start:stop])
