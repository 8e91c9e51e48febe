"""Ways to tune on the target's examples, one file each: which parameters train, and from which start.

A method has ``PLAN``, a :class:`Plan`. Whatever it trains, the result is a weighted sum of updates, which
collapses into one expert. The task head trains in every method.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What a tune method composes and trains.

    Attributes:
        experts: whether the chosen experts are in the sum.
        target: whether the target's own expert is in the sum (a fresh one stands in if it has none).
        fresh: whether a fresh expert, trained from the pool's init, is the whole sum.
        train_weights: the softmax weights train; else they stay as they start.
        train_experts: the experts' factors train.
        ranked_start: the weights may start from the ranking; else they are equal.
    """

    experts: bool = False
    target: bool = False
    fresh: bool = False
    train_weights: bool = False
    train_experts: bool = False
    ranked_start: bool = False

    @property
    def lr(self) -> float:
        """The learning rate where the user gives none: factors want a smaller one than a head on frozen features."""
        return 2e-3 if self.train_experts else 5e-3
