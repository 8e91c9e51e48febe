"""How to train: the numbers that ``pimerge tune`` and ``pimerge compare`` take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pimerge.core.errors import Problems
from pimerge.tuning.plan import Granularity


class DecayTowards(StrEnum):
    """Where weight decay pulls parameters."""

    ZERO = "zero"
    START = "start"
    """The start of the training (L2-SP, arXiv 1802.01483)."""


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        epochs: the most passes over the training examples; early stopping may end the training before.
        stop_after: the epoch after which the training ends in any case, on the learning rate's schedule for all
            epochs; None for the last.
        lr: learning rate of factors and head; None for the method's own.
        weights_lr: learning rate of the experts' weights.
        batch_size: examples per step.
        seed: decides every random draw but that of a fresh expert's init.
        holdout: share of the training examples kept for early stopping, the same of each class; None for the method's
            own.
        patience: epochs without a lower held-out loss before the training ends.
        shots: training examples of each class; None for all.
        label_smoothing: share of the target that is spread over all classes.
        warmup: share of the steps over which the learning rate rises.
        weight_decay: of factors and head.
        max_grad_norm: gradients are clipped to this norm.
        decay_towards: a :class:`DecayTowards`.
        ema: decay of a moving average of what trains, which is scored and kept; None for none.
        sam: radius of sharpness-aware minimisation, which takes two passes per step; None for none.
        granularity: which modules share weights, a :class:`pimerge.tuning.plan.Granularity`.
        class_names: whether the names of the classes are examples as well; None for the method's own choice, which is
            to use them where they predict the examples.
        rank: highest rank of the result; None keeps every direction.
        fresh_kind: kind of a fresh expert; None for the pool's, else LoRA.
        fresh_rank: rank of a fresh LoRA, or size of a bottleneck, prefix or prompt; None for the pool's, else 8.
        fresh_alpha: alpha of a fresh LoRA; None for the pool's, else its rank.
        fresh_modules: modules of a fresh expert; None for the pool's, else those that PEFT adapts in the architecture.
        init_seed: decides the init of a fresh expert, so that several tasks can share one.
    """

    epochs: float = 30
    stop_after: int | None = None
    lr: float | None = None
    weights_lr: float = 5e-2
    batch_size: int = 16
    seed: int = 0
    holdout: float | None = None
    patience: int = 8
    shots: int | None = None
    label_smoothing: float = 0.1
    warmup: float = 0.06
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    decay_towards: str = DecayTowards.ZERO
    ema: float | None = None
    sam: float | None = None
    granularity: str = Granularity.MATRIX
    class_names: bool | None = None
    rank: int | None = None
    fresh_kind: str | None = None
    fresh_rank: int | None = None
    fresh_alpha: float | None = None
    fresh_modules: tuple[str, ...] | None = None
    init_seed: int = 0


_POSITIVE = ("epochs", "batch_size", "patience", "max_grad_norm", "fresh_alpha", "sam")
_RANGES: Sequence[tuple[Sequence[str], Callable[[Any], bool], str]] = [
    (_POSITIVE, lambda value: 0 < value < math.inf, "a positive number"),
    # AdamW moves every number by about the rate at each step: above, no training is left, and float32 overflows
    (("lr", "weights_lr"), lambda value: 0 < value <= 1e6, "above 0 and at most 1e+06"),
    (("holdout", "label_smoothing", "warmup", "ema"), lambda value: 0 <= value < 1, "at least 0 and below 1"),
    (("rank", "fresh_rank", "shots"), lambda value: value >= 1, "at least 1"),
    (("weight_decay",), lambda value: value >= 0, "at least 0"),
    (("decay_towards",), list(DecayTowards).__contains__, f"one of {', '.join(DecayTowards)}"),
    (("granularity",), list(Granularity).__contains__, f"one of {', '.join(Granularity)}"),
]


def check_options(options: TrainingOptions) -> None:
    """Refuse options that are out of range, all of them at once."""
    problems = Problems()
    for names, accepts, expected in _RANGES:
        for name in names:
            value = getattr(options, name)
            if value is not None and not accepts(value):
                problems.add(f"--{name.replace('_', '-')} must be {expected}; got {value}")
    problems.raise_any("the training options are out of range")
