"""Search one weight per expert by an evolution strategy, without gradients (LoRAHub, arXiv 2307.13269).

    min over w in [−1.5, 1.5]^N of loss(W0 + Σ_n w_n ΔW_n) + 0.05 · Σ_n |w_n| / N

by nevergrad's CMA-ES, from the ranking's weights. (The paper's NGOpt fails for some numbers of evaluations with current
numpy versions.) A task's head is trained on the frozen sum, with half of the epochs before the search and half after
it. The search adds one pass over the training examples per evaluation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pimerge.core.plugins import Option
from pimerge.tuning.method import Granularity, MixtureKind, MixturePlan, TuneMethod

if TYPE_CHECKING:
    from pimerge.tuning.session import TuneRequest, TuneResult

BOUND = 1.5
L1 = 0.05


def fit(request: TuneRequest, *, evaluations: int) -> TuneResult:
    """Train the head, search the weights, and train the head again."""
    import torch

    from pimerge.core.errors import PimergeError
    from pimerge.tuning.fit import mix_experts
    from pimerge.tuning.loss import held_out_loss
    from pimerge.tuning.trainer import untrained

    try:
        import nevergrad
    except ImportError as error:
        raise PimergeError(
            "'gradient-free' needs nevergrad, which is not installed", "pip install 'pimerge[gradient-free]'"
        ) from error
    mixed, kept, held_out = mix_experts(request, METHOD)
    has_head = bool(request.session.loaded.head)
    half = request.options.epochs / 2
    first = mixed.train(kept, held_out, part="before", epochs=half) if has_head else None
    weights = mixed.mixture.logits
    start = weights.detach()[0].double().cpu().numpy()
    space = nevergrad.p.Array(init=start.clip(-BOUND, BOUND)).set_bounds(-BOUND, BOUND)
    space.random_state.seed(request.options.seed)
    search = nevergrad.optimizers.CMA(parametrization=space, budget=evaluations)

    def put(values: object) -> None:
        with torch.no_grad():
            weights.copy_(torch.as_tensor(values).to(weights).expand_as(weights))

    def cost(values: object) -> float:
        put(values)
        penalty = L1 * float(weights[0].abs().mean())
        return held_out_loss(mixed.model, kept, request.session.device) + penalty

    with request.track("searching", evaluations, "evaluations") as advance:
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
        second = mixed.train(kept, held_out, part="after", epochs=request.options.epochs - half)
        outcome = replace(second, epochs=first.epochs + second.epochs, held_out_losses=())
    outcome = replace(outcome, trained_parameters=outcome.trained_parameters + weights.shape[1])
    return mixed.result(outcome, kept, held_out)


METHOD = TuneMethod(
    name="gradient-free",
    summary="Search one weight per expert by an evolution strategy, without gradients.",
    formula="ΔW = Σ_n w_n ΔW_n, w in [−1.5, 1.5]^N minimises the loss + 0.05 · Σ_n |w_n| / N",
    paper="LoRAHub, arXiv 2307.13269",
    plan=MixturePlan(experts=True, ranked_start=True, mixture=MixtureKind.FREE, granularity=Granularity.GLOBAL),
    fit=fit,
    options={Option("evaluations", int, "Sets of weights to try.", lambda count: count >= 1, "at least 1"): 40},
)
