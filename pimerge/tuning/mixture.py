"""Trainable weights of several experts inside one model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from pimerge.tuning.method import Granularity, MixtureKind, MixturePlan

if TYPE_CHECKING:
    from torch import Tensor


class Mixture(nn.Module):
    """Weights of N experts, one vector per group of modules: the softmax of trained logits.

    Args:
        modules: names of all modules that the experts adapt.
        start: N logits whose softmax gives the initial weights.
        granularity: which modules share a vector.
        trained: whether the weights train.
    """

    sums_to_one = True

    def __init__(self, modules: Sequence[str], start: Sequence[float], granularity: Granularity, trained: bool) -> None:
        super().__init__()
        self.group_of = group_modules(modules, granularity)
        groups = max(self.group_of.values(), default=0) + 1
        self.logits = nn.Parameter(self._start(torch.tensor(list(start)).float()).repeat(groups, 1), trained)

    def _start(self, logits: Tensor) -> Tensor:
        return logits

    def forward(self, module: str) -> Tensor:
        """The weights (N) of one module, or (N × d_out) of its outputs."""
        return self.logits[self.group_of[module]].softmax(0)

    def weights(self) -> dict[str, list[float]]:
        """Module → weights; weights of individual outputs are averaged."""
        with torch.no_grad():
            found = {module: self(module) for module in sorted(self.group_of)}
        return {
            module: each.flatten(1).mean(1).tolist() if each.dim() > 1 else each.tolist()
            for module, each in found.items()
        }


class FreeMixture(Mixture):
    """Weights that train without a softmax, and need not sum to one."""

    sums_to_one = False

    def _start(self, logits: Tensor) -> Tensor:
        return logits.softmax(0)

    def forward(self, module: str) -> Tensor:
        """The weights (N) of one module."""
        return self.logits[self.group_of[module]]


class ChannelMixture(FreeMixture):
    """Weights for every output: ΔW = Σ_n diag(ω_n) s_n B_n A_n.

    Args:
        widths: d_out of each module.
    """

    def __init__(
        self, widths: Mapping[str, int], start: Sequence[float], granularity: Granularity, trained: bool
    ) -> None:
        super().__init__(list(widths), start, granularity, trained)
        self.widths = dict(widths)
        widest = max(self.widths.values(), default=0)
        self.logits = nn.Parameter(self.logits.detach()[..., None].repeat(1, 1, widest), trained)

    def forward(self, module: str) -> Tensor:
        """The weights (N × d_out) of one module."""
        return super().forward(module)[:, : self.widths[module]]


class Switch(Mixture):
    """One expert at a time, at weight one, or none; nothing trains."""

    sums_to_one = False

    def __init__(self, modules: Sequence[str], count: int) -> None:
        super().__init__(modules, [0.0] * count, Granularity.GLOBAL, trained=False)
        self.choose(None)

    def choose(self, expert: int | None) -> None:
        """Activate one expert; None activates the bare base."""
        with torch.no_grad():
            self.logits.zero_()
            if expert is not None:
                self.logits[:, expert] = 1.0

    def forward(self, module: str) -> Tensor:
        """The weights (N) of one module: a one for the active expert, and zeros."""
        return self.logits[self.group_of[module]]


def make_mixture(
    plan: MixturePlan, granularity: Granularity, parts: Sequence[str], start: Sequence[float], widths: Mapping[str, int]
) -> Mixture:
    """Make the weights for a plan.

    Args:
        granularity: the user's option, for plans that do not fix it.
        parts: names of the modules or tensor sets that have weights.
        start: N logits whose softmax gives the initial weights.
        widths: d_out of each module.
    """
    trained = plan.train_weights and (len(start) > 1 or plan.mixture != MixtureKind.SOFTMAX)
    granularity = plan.granularity or granularity
    match plan.mixture:
        case MixtureKind.SWITCH:
            return Switch(parts, len(start))
        case MixtureKind.CHANNELS:
            return ChannelMixture(widths, start, granularity, trained)
        case MixtureKind.FREE:
            return FreeMixture(parts, start, granularity, trained)
        case MixtureKind.SOFTMAX:
            return Mixture(parts, start, granularity, trained)


def group_modules(modules: Sequence[str], granularity: Granularity) -> dict[str, int]:
    """Map each module to the number of the group whose weights it shares.

    >>> group_modules(["enc.0.q", "enc.0.v", "enc.1.q"], Granularity.LAYER)
    {'enc.0.q': 0, 'enc.0.v': 0, 'enc.1.q': 1}
    """
    numbers: dict[str, int] = {}
    groups = {}
    for module in sorted(modules):
        layer = re.match(r"(.*?\.\d+)(?:\.|$)", module)
        key = {
            Granularity.MATRIX: module,
            Granularity.LAYER: layer[1] if layer else module,
            Granularity.ROLE: re.sub(r"\.\d+(?=\.|$)", "", module),
            Granularity.GLOBAL: "",
        }[granularity]
        groups[module] = numbers.setdefault(key, len(numbers))
    return groups
