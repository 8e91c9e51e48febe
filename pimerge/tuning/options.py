"""Training options of ``pimerge tune`` and ``pimerge compare``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pimerge.core.arguments import check_arguments
from pimerge.core.errors import Problems
from pimerge.tuning.method import Granularity


class DecayTowards(StrEnum):
    """The point that weight decay pulls parameters towards."""

    ZERO = "zero"
    START = "start"
    """The initial value of each parameter (L2-SP, arXiv 1802.01483)."""


@dataclass(frozen=True)
class TrainingOptions:
    """Training options.

    Attributes:
        epochs: maximum number of passes over the training examples; early stopping may end it earlier.
        stop_after: epoch after which training ends, while the learning rate's schedule spans all epochs; None trains to
            the last epoch.
        lr: learning rate of factors and head; None uses the method's default.
        weights_lr: learning rate of the experts' weights.
        batch_size: examples per step.
        seed: seed of all random choices except a fresh expert's init.
        holdout: share of the training examples held out for early stopping, equal for each class; None uses the
            method's default.
        patience: epochs without a lower held-out loss before the training ends.
        shots: training examples per class; None uses all.
        label_smoothing: share of the target's probability that is spread over all classes.
        warmup: share of the steps over which the learning rate rises.
        weight_decay: weight decay of factors and head.
        max_grad_norm: gradients are clipped to this norm.
        decay_towards: a :class:`DecayTowards`.
        ema: decay of an exponential moving average of the trained parameters, which replaces them in the result; None
            turns it off.
        sam: radius of sharpness-aware minimisation, which takes two passes per step; None turns it off.
        granularity: which modules share weights, a :class:`pimerge.tuning.method.Granularity`.
        class_names: whether class names become training examples; None uses the method's default, which tests whether
            the names predict the examples.
        rank: highest rank of the result; None keeps every direction.
        fresh_kind: kind of a fresh expert; None uses the pool's kind, or LoRA without a pool.
        fresh_rank: rank of a fresh LoRA, or size of a bottleneck, prefix or prompt; None uses the pool's, or 8.
        fresh_alpha: alpha of a fresh LoRA; None uses the pool's, or the rank.
        fresh_modules: modules of a fresh expert; None uses the pool's, or those that PEFT adapts in the architecture.
        init_seed: seed of a fresh expert's init, so that experts of several tasks can share one.
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
    # AdamW moves every parameter by about the learning rate at each step; larger rates overflow float32
    (("lr", "weights_lr"), lambda value: 0 < value <= 1e6, "above 0 and at most 1e+06"),
    (("holdout", "label_smoothing", "warmup", "ema"), lambda value: 0 <= value < 1, "at least 0 and below 1"),
    (("rank", "fresh_rank", "shots"), lambda value: value >= 1, "at least 1"),
    (("weight_decay",), lambda value: value >= 0, "at least 0"),
    (("decay_towards",), list(DecayTowards).__contains__, f"one of {', '.join(DecayTowards)}"),
    (("granularity",), list(Granularity).__contains__, f"one of {', '.join(Granularity)}"),
]


def check_options(options: TrainingOptions) -> None:
    """Refuse options that are out of range; all problems are raised at once."""
    problems = Problems()
    wrong = check_arguments(vars(options), TrainingOptions.__annotations__, globals(), problems)
    for names, accepts, expected in _RANGES:
        for name in names:
            value = getattr(options, name)
            if value is not None and name not in wrong and not accepts(value):
                problems.add(f"--{name.replace('_', '-')} must be {expected}; got {value}")
    problems.raise_any("the training options are out of range")
