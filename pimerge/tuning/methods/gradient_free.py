"""One weight per expert found by an evolution strategy, by forwards alone (LoRAHub, arXiv 2307.13269).

    min over w in [−1.5, 1.5]^N of loss(W0 + Σ_n w_n ΔW_n) + 0.05 · Σ_n |w_n| / N

by nevergrad's CMA-ES, from the ranking's weights. (The paper's NGOpt fails at some numbers of evaluations with the
numpy of today.) A task's head is trained on the frozen sum before, with half of the epochs, and after the search with
the other half; the search itself comes on top of the epochs, a forward over the training examples for each evaluation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pimerge.tuning.methods import Plan

if TYPE_CHECKING:
    from pimerge.tuning.session import Fitted, Job

PLAN = Plan(experts=True, ranked_start=True, mixture="free", granularity="global")
BOUND = 1.5
L1 = 0.05


def fit(job: Job, *, evaluations: int = 40) -> Fitted:
    """Search.

    Args:
        evaluations: how many sets of weights are tried, each on all training examples.

    Raises:
        PimergeError: if nevergrad is not there, or the number does not fit.
    """
    import torch

    from pimerge.core.errors import PimergeError
    from pimerge.tuning.mixed_expert import compose_sum
    from pimerge.tuning.trainer import held_out_loss, untrained

    if evaluations < 1:
        raise PimergeError(f"--evaluations is {evaluations}", "expected at least 1")
    try:
        import nevergrad
    except ImportError as error:
        raise PimergeError(
            "'gradient-free' needs nevergrad, which is not installed", "pip install 'pimerge[gradient-free]'"
        ) from error
    composed, kept, held_out = compose_sum(job, PLAN, "gradient-free")
    has_head = bool(job.bench.loaded.head)
    half = job.options.epochs / 2
    first = composed.train(kept, held_out, part="before", epochs=half) if has_head else None
    weights = composed.mixture.logits
    start = weights.detach()[0].double().cpu().numpy()
    space = nevergrad.p.Array(init=start.clip(-BOUND, BOUND)).set_bounds(-BOUND, BOUND)
    space.random_state.seed(job.options.seed)
    search = nevergrad.optimizers.CMA(parametrization=space, budget=evaluations)

    def put(values: object) -> None:
        with torch.no_grad():
            weights.copy_(torch.as_tensor(values).to(weights).expand_as(weights))

    def cost(values: object) -> float:
        put(values)
        penalty = L1 * float(weights[0].abs().mean())
        return held_out_loss(composed.model, kept, job.bench.device) + penalty

    with job.track("searching", evaluations, "evaluations") as advance:
        best, least = start, cost(start)
        for _ in range(evaluations):
            candidate = search.ask()
            found = cost(candidate.value)
            search.tell(candidate, found)
            if found < least:
                best, least = candidate.value, found
            advance(1)
    put(best)
    if first is None:
        outcome = replace(untrained(), train_loss=least)
    else:
        second = composed.train(kept, held_out, part="after", epochs=job.options.epochs - half)
        outcome = replace(second, epochs=first.epochs + second.epochs, held_out_losses=())
    outcome = replace(outcome, trained_parameters=outcome.trained_parameters + weights.shape[1])
    return composed.fitted(outcome, kept, held_out)
