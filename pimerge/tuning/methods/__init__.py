"""Ways to tune on the target's examples, one file each: which parameters train, and from which start.

A method has ``PLAN``, a :class:`MixturePlan` of a weighted sum of experts, and is that sum, trained. One that is more
has ``fit(request, *, options)`` → :class:`pimerge.tuning.session.TuneResult` besides; its keyword arguments are its
options. The task head trains in every method.
"""

from __future__ import annotations

from dataclasses import dataclass

WIDTH = 384
"""Hidden size of the base that the usual learning rates were chosen on."""


@dataclass(frozen=True)
class MixturePlan:
    """What a tune method composes and trains.

    Attributes:
        experts: whether the chosen experts are in the sum.
        target: whether the target's own expert is in the sum (a fresh one stands in if it has none).
        fresh: whether a fresh expert, trained from the pool's init, is the whole sum.
        random_experts: whether fresh experts take the places of the chosen ones.
        train_weights: the weights train; else they stay as they start.
        train_experts: the experts' factors train.
        ranked_start: the weights may start from the ranking; else they are equal.
        mixture: the weights are a ``softmax``, ``free``, free for each of the ``channels`` of an output, or a
            ``switch`` that lets one expert answer at a time.
        granularity: what shares weights, where the method says it; None for the option's.
        full: the whole base trains, in place of any expert.
        start_by_gain: weights that start from the ranking start from the gains that it expects.
        class_names: where the user does not say, the names of the classes are examples, too, if they are texts that
            foretell the examples (:mod:`pimerge.tuning.class_name_examples`).
        lr: the learning rate where the user gives none, at a hidden size of 384; None for the usual one, of which the
            less the more trains.
        holdout: share of the examples that is held out where the user gives none.
    """

    experts: bool = False
    target: bool = False
    fresh: bool = False
    random_experts: bool = False
    train_weights: bool = False
    train_experts: bool = False
    ranked_start: bool = False
    mixture: str = "softmax"
    granularity: str | None = None
    full: bool = False
    start_by_gain: bool = False
    class_names: bool = False
    lr: float | None = None
    holdout: float = 0.2

    def usual_lr(self, width: int | None) -> float:
        """The learning rate where the user gives none.

        That of the base's own weights is in inverse proportion to its hidden size (μP, arXiv 2203.03466). That of
        factors is, too, above the size at which it was chosen: so it was measured at 768 (``docs/tuning.md``).

        Args:
            width: hidden size of the base; None where it is not known.

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
        """Whether nothing but a head trains, and no expert is there."""
        return not self.experts and not self.train_experts and not self.full
