"""Train a scale for every output of each frozen expert (ScaLearn, arXiv 2310.01217).

    ΔW = Σ_n diag(ω_n) ΔW_n, with ω_n in R^d_out for each matrix

``--uniform`` trains one number for all outputs and all matrices of a layer (the paper's ScaLearnUniform); ``--shared``
uses the same scales in all layers (its ScaLearn++; both together are its ScaLearnUniform++). The paper scales the
outputs of bottleneck adapters side by side; the sum of updates ΔW is one update again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pimerge.core.plugins import Option
from pimerge.tuning.method import Granularity, MixtureKind, MixturePlan, TuneMethod

if TYPE_CHECKING:
    from pimerge.tuning.session import TuneRequest, TuneResult


def fit(request: TuneRequest, *, uniform: bool, shared: bool) -> TuneResult:
    """Train the scales and the head."""
    from pimerge.tuning.fit import train_mixture

    granularity = {
        (False, False): Granularity.MATRIX,
        (False, True): Granularity.ROLE,
        (True, False): Granularity.LAYER,
        (True, True): Granularity.GLOBAL,
    }[uniform, shared]
    mixture = MixtureKind.FREE if uniform else MixtureKind.CHANNELS
    return train_mixture(request, replace(METHOD, plan=replace(METHOD.plan, mixture=mixture, granularity=granularity)))


METHOD = TuneMethod(
    name="scalearn",
    summary="Train a scale for every output of each expert; the experts stay frozen.",
    formula="ΔW = Σ_n diag(ω_n) ΔW_n",
    paper="ScaLearn, arXiv 2310.01217",
    plan=MixturePlan(
        experts=True,
        train_weights=True,
        ranked_start=True,
        mixture=MixtureKind.CHANNELS,
        granularity=Granularity.MATRIX,
    ),
    fit=fit,
    options={
        Option("uniform", bool, "Train one scale per layer and expert."): False,
        Option("shared", bool, "Use the same scales in all layers."): False,
    },
)
