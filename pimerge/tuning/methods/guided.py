"""Train the chosen experts, weighted by expected gain, from a probe's head, and move part of the way back.

1. w_n ∝ exp(gain_n / τ), τ = 0.1 / √(number of labelled examples), with the gains of ``pimerge rank``; without gains
   the weights start from the ranking's scores as in ``learned``. With fewer examples, gains are less reliable and the
   weights are closer to equal.
2. For texts in classes named by words, the names become training examples
   (:mod:`pimerge.tuning.class_name_examples`).
3. The head is the linear probe of the mixed features (:mod:`pimerge.tuning.probe_head`), and training starts from a
   tenth of it: the whole probe leaves too little error for the features to learn from, and with a random head the
   first steps damage the features.
4. Weights, factors and head are trained, as in ``interpolated``.
5. The result is three quarters of the way from the start (with the whole probe) to the end, as in WiSE-FT
   (arXiv 2109.01903).

If the base answers in text, or the head has no linear layer for the classes, steps 3 and 5 are omitted.
``docs/tuning.md`` describes how the method was found, and its gains.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pimerge.tuning.method import MixturePlan, TuneMethod

if TYPE_CHECKING:
    from pimerge.tuning.session import TuneRequest, TuneResult

PROBE_SHARE = 0.1
"""Factor of the probe from which the head's training starts."""
WAY = 0.75
"""Position of the result between the start (0) and the end (1) of the training."""


def fit(request: TuneRequest) -> TuneResult:
    """Mix, train, and move part of the way back."""
    import torch

    from pimerge.tuning.fit import between, mix_experts
    from pimerge.tuning.probe_head import fit_head

    session = request.session
    mixed, kept, held_out = mix_experts(request, METHOD)
    layer = fit_head(session.loaded, mixed.model, session.task, kept)
    if layer is None:
        return mixed.result(mixed.train(kept, held_out), kept, held_out)
    start = mixed.trained_state()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(PROBE_SHARE)
    outcome = mixed.train(kept, held_out)
    mixed.load_trained_state(between(start, mixed.trained_state(), WAY))
    return mixed.result(replace(outcome, held_out_losses=()), kept, held_out)  # those losses belong to the end


METHOD = TuneMethod(
    name="guided",
    summary="Weight the chosen experts by expected gain, train, and go some of the way back.",
    formula="θ = θ_0 + 0.75 (θ_T − θ_0), ΔW = Σ_n α_n ΔW_n, α_n starts ∝ exp(gain_n / τ)",
    paper="docs/tuning.md; the way back as in WiSE-FT, arXiv 2109.01903",
    plan=MixturePlan(
        experts=True,
        train_weights=True,
        train_experts=True,
        ranked_start=True,
        start_by_gain=True,
        class_names=True,
        lr=5e-3,
        holdout=0.0,
    ),
    fit=fit,
    without_experts="named",
)
