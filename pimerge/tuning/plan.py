"""What a tune method mixes and trains, without torch: method files and ``--help`` import it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

WIDTH = 384
"""Hidden size of the base on which the default learning rates were chosen."""


class Granularity(StrEnum):
    """Which modules share a vector of weights."""

    MATRIX = "matrix"
    """None: each module has its own vector."""
    LAYER = "layer"
    """The modules of one layer."""
    ROLE = "role"
    """The modules of the same name in all layers."""
    GLOBAL = "global"
    """All modules."""


class MixtureKind(StrEnum):
    """How the weights of a mixture are parametrised."""

    SOFTMAX = "softmax"
    FREE = "free"
    """The weights themselves; they need not sum to one."""
    CHANNELS = "channels"
    """Free, one for each output of a module."""
    SWITCH = "switch"
    """One expert answers at a time."""


@dataclass(frozen=True)
class MixturePlan:
    """What a tune method mixes and trains; the task head always trains.

    Attributes:
        experts: whether the chosen experts are in the mixture.
        target: whether the target's own expert is in the mixture; a fresh one replaces it if there is none.
        fresh: whether one fresh expert, from the pool's init, is the whole mixture.
        random_experts: whether fresh experts replace the chosen ones.
        train_weights: whether the weights train; otherwise they stay at their start.
        train_experts: whether the experts' factors train.
        ranked_start: whether the weights may start from the ranking; otherwise they start equal.
        mixture: how the weights are parametrised.
        granularity: which modules share weights, if the method fixes it; None for the user's option.
        full: whether the whole base trains, without any expert.
        start_by_gain: whether weights that start from the ranking start from its expected gains.
        class_names: whether, by default, the names of the classes become examples where they are texts that predict
            the examples (:mod:`pimerge.tuning.class_name_examples`).
        lr: default learning rate at a hidden size of 384; None for the usual one, which is lower the more trains.
        holdout: default share of the examples that is held out.
    """

    experts: bool = False
    target: bool = False
    fresh: bool = False
    random_experts: bool = False
    train_weights: bool = False
    train_experts: bool = False
    ranked_start: bool = False
    mixture: MixtureKind = MixtureKind.SOFTMAX
    granularity: Granularity | None = None
    full: bool = False
    start_by_gain: bool = False
    class_names: bool = False
    lr: float | None = None
    holdout: float = 0.2

    def usual_lr(self, width: int | None) -> float:
        """The default learning rate.

        For the base's own weights it is inversely proportional to the hidden size (μP, arXiv 2203.03466). For factors
        it is so above the hidden size at which it was chosen, as measured at 768 (``docs/tune-methods.md``).

        Args:
            width: hidden size of the base; None if it is not known.

        >>> [MixturePlan(train_experts=True, lr=5e-3).usual_lr(width) for width in (48, 384, 768)]
        [0.005, 0.005, 0.0025]
        """
        if self.full:
            return 0.05 / (width or 1_000)
        if self.train_experts:
            return (self.lr or 2e-3) * min(1.0, WIDTH / (width or WIDTH))
        return self.lr or 5e-3

    @property
    def head_alone(self) -> bool:
        """Whether nothing but a head trains, without any expert."""
        return not self.experts and not self.train_experts and not self.full
