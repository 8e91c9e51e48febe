"""The mean of several runs of π-Tuning that differ in order and learning rate: a greedy soup (arXiv 2203.05482).

The runs start from one point and divide the epochs among themselves. From the best by held-out loss downwards, a run
is taken into the mean of what trained if that does not raise the held-out loss (algorithm 1). Without held-out examples
all are taken.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pimerge.tuning.methods import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.tuning.session import Fitted, Job

PLAN = Plan(experts=True, target=True, train_weights=True, train_experts=True, ranked_start=True)
FACTORS = (1.0, 0.5, 2.0)
"""Of the learning rate, run after run."""


def fit(job: Job, *, runs: int = 3) -> Fitted:
    """Train, and mix.

    Args:
        runs: how many.

    Raises:
        PimergeError: if there are less than two runs.
    """
    from pimerge.core.errors import PimergeError
    from pimerge.tuning.mixed_expert import compose_sum, mean_state
    from pimerge.tuning.trainer import held_out_loss

    if runs < 2:
        raise PimergeError(f"--runs is {runs}", "expected at least 2; for one take 'interpolated'")
    composed, kept, held_out = compose_sum(job, PLAN, "soup")
    start = composed.trained_state()
    found, outcomes = [], []
    for number in range(runs):
        composed.load_trained_state(start)
        outcomes.append(
            composed.train(
                kept,
                held_out,
                part=f"run-{number}",
                epochs=job.options.epochs / runs,
                seed=job.options.seed + number,
                lr=(job.options.lr or PLAN.usual_lr(job.bench.loaded.width)) * FACTORS[number % len(FACTORS)],
            )
        )
        found.append(composed.trained_state())

    def loss_of(states: list[dict[str, Tensor]]) -> float:
        composed.load_trained_state(mean_state(states))
        assert held_out is not None
        return held_out_loss(composed.model, held_out, job.bench.device)

    taken = found
    best = None
    if held_out is not None:
        losses = [loss_of([state]) for state in found]
        order = sorted(range(runs), key=lambda number: losses[number])
        taken, best = [found[order[0]]], losses[order[0]]
        for number in order[1:]:
            tried = loss_of([*taken, found[number]])
            if tried <= best:
                taken, best = [*taken, found[number]], tried
    composed.load_trained_state(mean_state(taken))
    job.note(f"the soup holds {len(taken)} of {runs} runs")
    outcome = replace(
        outcomes[0],
        epochs=sum(outcome.epochs for outcome in outcomes),
        held_out_losses=(),
        held_out_loss=best,
        trained_parameters=outcomes[0].trained_parameters,
    )
    return composed.fitted(outcome, kept, held_out)
