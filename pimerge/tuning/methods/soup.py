"""The mean of several runs of π-Tuning that differ in order and learning rate: a greedy soup (arXiv 2203.05482).

The runs start from one point and divide the epochs among themselves. From the best by held-out loss downwards, a run
is taken into the mean of what trained if that does not raise the held-out loss (algorithm 1). Without held-out examples
all are taken.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pimerge.tuning.methods import MixturePlan

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.tuning.session import TuneRequest, TuneResult

PLAN = MixturePlan(experts=True, target=True, train_weights=True, train_experts=True, ranked_start=True)
FACTORS = (1.0, 0.5, 2.0)
"""Of the learning rate, run after run."""


def fit(request: TuneRequest, *, runs: int = 3) -> TuneResult:
    """Train, and mix.

    Args:
        runs: how many.

    Raises:
        PimergeError: if there are less than two runs.
    """
    from pimerge.core.errors import PimergeError
    from pimerge.tuning.mixed_expert import mean_state, mix_experts
    from pimerge.tuning.trainer import held_out_loss

    if runs < 2:
        raise PimergeError(f"--runs is {runs}", "expected at least 2; for one take 'interpolated'")
    mixed, kept, held_out = mix_experts(request, PLAN, "soup")
    start = mixed.trained_state()
    found, outcomes = [], []
    for number in range(runs):
        mixed.load_trained_state(start)
        outcomes.append(
            mixed.train(
                kept,
                held_out,
                part=f"run-{number}",
                epochs=request.options.epochs / runs,
                seed=request.options.seed + number,
                lr=(request.options.lr or PLAN.usual_lr(request.session.loaded.width)) * FACTORS[number % len(FACTORS)],
            )
        )
        found.append(mixed.trained_state())

    def loss_of(states: list[dict[str, Tensor]]) -> float:
        mixed.load_trained_state(mean_state(states))
        assert held_out is not None
        return held_out_loss(mixed.model, held_out, request.session.device)

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
    mixed.load_trained_state(mean_state(taken))
    request.note(f"the soup holds {len(taken)} of {runs} runs")
    outcome = replace(
        outcomes[0],
        epochs=sum(outcome.epochs for outcome in outcomes),
        held_out_losses=(),
        held_out_loss=best,
        trained_parameters=outcomes[0].trained_parameters,
    )
    return mixed.result(outcome, kept, held_out)
