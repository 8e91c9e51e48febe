"""How to train: the numbers that ``pimerge tune`` and ``pimerge compare`` take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pimerge.core.errors import Problems
from pimerge.tuning.lora_layers import GRANULARITIES

DECAYS = ("zero", "start")
_HIGHEST_RATE = 1e6
"""AdamW moves every number by about the rate at each step: no training is left above, and float32 overflows."""


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        epochs: most passes over the training examples; early stopping may end it before. ``stop_after``: where it ends
            in any case, with the learning rate on its way through all epochs; None for the end.
        lr: learning rate of factors and head; None for the method's own. ``weights_lr``: of the mixture's logits.
        holdout: share of the training examples kept for early stopping, the same of each class; 0 for none, None for
            the method's own.
        patience: epochs without a better held-out loss before it stops.
        shots: examples drawn of each class; None for all.
        weight_decay: of factors and head; ``decay_towards``: ``zero``, or the ``start`` (L2-SP, arXiv 1802.01483).
        ema: decay of a moving average of what trains, which is what is scored and kept; None for none.
        sam: radius of sharpness-aware minimisation, at two passes a step; None for none.
        class_names: whether the names of the classes are examples, too; None for the method's own, which takes them
            where they foretell the examples.
        rank: of the exported expert; None keeps every direction.
        fresh_kind: of a fresh expert; None for the pool's, else LoRA.
        fresh_rank, fresh_alpha, fresh_modules: of a fresh expert; None for the pool's, else r = alpha = 8 on
            the modules that PEFT adapts in this architecture. Of a bottleneck, prefix or prompt, the rank is its size.
        init_seed: of a fresh expert, so that several tasks share one init; ``seed`` decides all else.
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
    decay_towards: str = "zero"
    ema: float | None = None
    sam: float | None = None
    granularity: str = "matrix"
    class_names: bool | None = None
    rank: int | None = None
    fresh_kind: str | None = None
    fresh_rank: int | None = None
    fresh_alpha: float | None = None
    fresh_modules: tuple[str, ...] | None = None
    init_seed: int = 0


def check_options(options: TrainingOptions) -> None:
    """Check the numbers.

    Raises:
        PimergeError: with each that does not fit.
    """
    problems = Problems()
    positive = ("epochs", "lr", "weights_lr", "batch_size", "patience", "max_grad_norm", "fresh_alpha", "sam")
    for field in positive:
        value = getattr(options, field)
        if value is not None and not 0 < value < math.inf:
            problems.add(f"--{field.replace('_', '-')} is {value}, expected a number above 0")
        elif value is not None and field in ("lr", "weights_lr") and value > _HIGHEST_RATE:
            problems.add(f"--{field.replace('_', '-')} is {value}, expected at most {_HIGHEST_RATE:g}")
    for field in ("holdout", "label_smoothing", "warmup", "ema"):
        if getattr(options, field) is not None and not 0 <= getattr(options, field) < 1:
            problems.add(f"--{field.replace('_', '-')} is {getattr(options, field)}, expected 0 or more and below 1")
    for field in ("rank", "fresh_rank", "shots"):
        if getattr(options, field) is not None and getattr(options, field) < 1:
            problems.add(f"--{field.replace('_', '-')} is {getattr(options, field)}, expected at least 1")
    if not options.weight_decay >= 0:
        problems.add(f"--weight-decay is {options.weight_decay}, expected 0 or more")
    if options.decay_towards not in DECAYS:
        problems.add(f"--decay-towards is '{options.decay_towards}'", f"expected {' or '.join(DECAYS)}")
    if options.granularity not in GRANULARITIES:
        problems.add(f"--granularity is '{options.granularity}'", f"expected {', '.join(GRANULARITIES)}")
    problems.raise_any("the options do not fit")
