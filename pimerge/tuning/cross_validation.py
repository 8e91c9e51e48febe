"""Choose learning rate and epochs of a tune method by cross-validation on the few examples.

Every method has the same budget: each of :data:`FACTORS` times its default learning rate is tried on the same folds for
all epochs. The training on all examples uses the learning rate and number of epochs with the lowest held-out loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pimerge.core.progress import unheard
from pimerge.tuning.fit import fit
from pimerge.tuning.loss import held_out_loss
from pimerge.tuning.method import TuneMethod
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.session import TuneRequest
from pimerge.tuning.trainer import LOWER, Diverged

FACTORS = (0.3, 1.0, 3.0)
FOLDS = 3


@dataclass(frozen=True)
class Tried:
    """A learning rate and its mean held-out loss after each epoch; a single loss for methods of several trainings."""

    lr: float
    losses: tuple[float, ...]

    @property
    def best(self) -> tuple[float, int]:
        """The lowest loss, and the number of epochs after which it occurred."""
        least = min(self.losses)
        return least, self.losses.index(least) + 1


def choose(method: TuneMethod, request: TuneRequest) -> TrainingOptions:
    """Choose the learning rate and number of epochs with the lowest held-out loss.

    With one example of each class nothing can be held out, so the default learning rate is kept.
    """
    session, options = request.session, request.options
    _, labels = session.task.examples(
        "train", session.loaded.processor, session.loaded.config, shots=options.shots, seed=options.seed
    )
    folds = min(FOLDS, max(labels.count(label) for label in set(labels)))
    if folds < 2:
        request.note("one example of each class: nothing can be held out, so the default learning rate is used")
        return replace(options, holdout=0.0)
    usual = options.lr or method.plan.usual_lr(session.loaded.width)
    tried = []
    for factor in FACTORS:
        try:
            curves = [_curve(method, request, usual * factor, fold, folds) for fold in range(folds)]
        except Diverged:
            curves = [[math.inf]]
        tried.append(Tried(usual * factor, tuple(sum(each) / len(curves) for each in zip(*curves, strict=True))))
    best = min(tried, key=lambda each: each.best)
    if math.isinf(best.best[0]):
        raise Diverged(f"the training diverged at every learning rate from {usual * min(FACTORS):g} on", LOWER)
    stop_after = best.best[1] if len(best.losses) > 1 else None
    request.note(
        f"on {folds} folds: "
        + ", ".join(f"held-out loss {each.best[0]:.3f} at --lr {each.lr:g}" for each in tried)
        + f"; chosen: {best.lr:g}"
        + (f", for {stop_after} epochs" if stop_after else "")
    )
    return replace(options, lr=best.lr, holdout=0.0, stop_after=stop_after)


def _curve(method: TuneMethod, request: TuneRequest, lr: float, fold: int, folds: int) -> Sequence[float]:
    """The held-out loss of a fold after each epoch, or only at the end."""
    part = request.with_options(f"lr-{lr:g}-fold-{fold}", lr=lr, holdout=0.0, patience=10**6)
    with request.session.restored(request.options.seed) as undo:
        part = replace(part, fold=(fold, folds), undo=undo, note=unheard)
        result = fit(method, part)
        losses = result.outcome.held_out_losses
        if not losses:
            _, held_out = part.examples()
            assert held_out is not None
            losses = (held_out_loss(result.model, held_out, request.session.device),)
        return [loss if math.isfinite(loss) else math.inf for loss in losses]
