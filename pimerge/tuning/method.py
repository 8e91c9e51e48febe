"""The family of tune methods: each file of ``tuning/methods/`` ends in one :class:`TuneMethod`, its ``METHOD``.

Method files and ``--help`` import this module, so it imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from pimerge.core.plugins import Family, Strategy

WIDTH = 384
"""Hidden size of the base on which the default learning rates were tuned."""


class Granularity(StrEnum):
    """Which modules share a vector of weights."""

    MATRIX = "matrix"
    """Each module has its own vector."""
    LAYER = "layer"
    """The modules of one layer share a vector."""
    ROLE = "role"
    """Modules of the same name share a vector across layers."""
    GLOBAL = "global"
    """All modules share one vector."""


class MixtureKind(StrEnum):
    """Parametrisation of a mixture's weights."""

    SOFTMAX = "softmax"
    FREE = "free"
    """The weights themselves; they need not sum to one."""
    CHANNELS = "channels"
    """Free weights, one for each output of a module."""
    SWITCH = "switch"
    """One expert is active at a time."""


@dataclass(frozen=True)
class MixturePlan:
    """The components and trained parts of a mixture; the task head always trains.

    Attributes:
        experts: whether the chosen experts are components.
        target: whether the target's own expert is a component; if there is none, a fresh expert replaces it.
        fresh: whether the mixture is a single fresh expert, from the pool's init.
        random_experts: whether fresh experts replace the chosen ones.
        train_weights: whether the weights train; otherwise they stay at their start.
        train_experts: whether the experts' factors train.
        ranked_start: whether the weights may start from the ranking; otherwise they start equal.
        mixture: how the weights are parametrised.
        granularity: which modules share weights, if the method fixes it; None uses the user's option.
        full: whether the whole base trains, without any expert.
        start_by_gain: whether a start from the ranking uses its expected gains, if it has any, and not its scores.
        class_names: whether class names become training examples by default, if they are texts that predict the
            examples (:mod:`pimerge.tuning.class_name_examples`).
        lr: default learning rate at a hidden size of 384; None uses 0.002 if experts train, else 0.005.
        holdout: default share of the examples to hold out.
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
        """The default learning rate for a base.

        For the base's own weights it is inversely proportional to the hidden size (μP, arXiv 2203.03466). For factors
        it is inversely proportional to hidden sizes above 384, as measured at 768 (``docs/tuning.md``).

        Args:
            width: hidden size of the base; None if unknown.

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
        """Whether only a head trains, without any expert."""
        return not self.experts and not self.train_experts and not self.full


@dataclass(frozen=True, kw_only=True)
class TuneMethod(Strategy):
    """A way to combine experts by training on the target's examples.

    Attributes:
        formula: the update or prediction that the method computes, for listings.
        paper: source of the method; empty if it has no paper.
        plan: components and trained parts.
        fit: (request, own options by keyword) → ``TuneResult``, which is still in the base's model; None uses
            :func:`pimerge.tuning.fit.train_mixture`: mix, train once and collapse.
        without_experts: name of the method that replaces this one when the ranking selects no expert.
        without_names: name of the method that replaces this one if class names are not texts; empty if it works
            without names.
        control: whether ``pimerge compare`` accepts it as a control, the baseline for the other methods.
    """

    formula: str
    paper: str = ""
    plan: MixturePlan
    fit: Callable[..., Any] | None = None  # a TuneResult, whose module imports this one
    without_experts: str = "scratch"
    without_names: str = ""
    control: bool = False

    def with_options(self, values: Mapping[str, Any] | None = None) -> TuneMethod:
        """The method with other values of its options; all wrong values are refused at once.

        Args:
            values: name of an option → value; None keeps the default.
        """
        given = METHODS.given_options(self, values or {})
        return replace(self, options={option: given.get(option.name, old) for option, old in self.options.items()})


METHODS = Family("pimerge.tuning.methods", "tune method", "METHOD", TuneMethod)


def open_tune_method(name: str, options: Mapping[str, Any] | None = None) -> TuneMethod:
    """Look up a tune method and set its own options.

    Args:
        options: name → value; None keeps the default.

    >>> open_tune_method("scalearn", {"uniform": True, "shared": None}).defaults
    {'uniform': True, 'shared': False}
    """
    return METHODS.load(name).with_options(options)
