"""Average several runs of π-Tuning that differ in order and learning rate: a greedy soup (arXiv 2203.05482).

The runs start from one point and share the epochs. In order of their held-out loss, a run joins the mean of trained
parameters if that does not raise the held-out loss (algorithm 1). Without held-out examples all runs join.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pimerge.core.plugins import Option
from pimerge.tuning.method import MixturePlan, TuneMethod

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.tuning.session import TuneRequest, TuneResult

LR_FACTORS = (1.0, 0.5, 2.0)
"""Factors of the learning rate, run after run."""


def fit(request: TuneRequest, *, runs: int) -> TuneResult:
    """Train all runs, then average them greedily."""
    from pimerge.tuning.fit import mean_state, mix_experts
    from pimerge.tuning.loss import held_out_loss

    mixed, kept, held_out = mix_experts(request, METHOD)
    start = mixed.trained_state()
    lr = request.options.lr or METHOD.plan.usual_lr(request.session.loaded.width)
    states, outcomes = [], []
    for number in range(runs):
        mixed.load_trained_state(start)
        changes = {
            "epochs": request.options.epochs / runs,
            "seed": request.options.seed + number,
            "lr": lr * LR_FACTORS[number % len(LR_FACTORS)],
        }
        outcomes.append(mixed.train(kept, held_out, part=f"run-{number}", **changes))
        states.append(mixed.trained_state())

    def loss_of(some: list[dict[str, Tensor]]) -> float:
        mixed.load_trained_state(mean_state(some))
        assert held_out is not None
        return held_out_loss(mixed.model, held_out, request.session.device)

    taken, lowest = states, None
    if held_out is not None:
        losses = [loss_of([state]) for state in states]
        first, *others = sorted(range(runs), key=lambda number: losses[number])
        taken, lowest = [states[first]], losses[first]
        for number in others:
            tried = loss_of([*taken, states[number]])
            if tried <= lowest:
                taken, lowest = [*taken, states[number]], tried
    mixed.load_trained_state(mean_state(taken))
    request.note(f"the soup holds {len(taken)} of {runs} runs")
    epochs = sum(outcome.epochs for outcome in outcomes)
    outcome = replace(outcomes[0], epochs=epochs, held_out_losses=(), held_out_loss=lowest)
    return mixed.result(outcome, kept, held_out)


METHOD = TuneMethod(
    name="soup",
    summary="Average several runs of 'interpolated' that differ in order and learning rate.",
    formula="θ = mean of the θ_T of the runs that lower the held-out loss",
    paper="greedy soup, arXiv 2203.05482, algorithm 1",
    plan=MixturePlan(experts=True, target=True, train_weights=True, train_experts=True, ranked_start=True),
    fit=fit,
    options={Option("runs", int, "Runs to average.", lambda runs: runs >= 2, "at least 2"): 3},
)
