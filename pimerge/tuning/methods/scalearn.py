"""Scales of every output of each expert trained, experts frozen (ScaLearn, arXiv 2310.01217).

    ΔW = Σ_n diag(ω_n) ΔW_n, with ω_n in R^d_out for each matrix

``--uniform`` has one number for all outputs and all matrices of a layer (the paper's ScaLearnUniform); ``--shared``
the same scales in all layers (its ScaLearn++, and both together its ScaLearnUniform++). The paper scales the outputs of
bottleneck adapters side by side; of updates ΔW the sum is one update again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pimerge.tuning.methods import MixturePlan

if TYPE_CHECKING:
    from pimerge.tuning.session import TuneRequest, TuneResult

PLAN = MixturePlan(experts=True, train_weights=True, ranked_start=True, mixture="channels", granularity="matrix")


def fit(request: TuneRequest, *, uniform: bool = False, shared: bool = False) -> TuneResult:
    """Train the scales and the head.

    Args:
        uniform: one scale per layer and expert.
        shared: the same scales in all layers.
    """
    from pimerge.tuning.mixed_expert import train_mixture

    granularity = {
        (False, False): "matrix",
        (False, True): "role",
        (True, False): "layer",
        (True, True): "global",
    }[uniform, shared]
    plan = replace(PLAN, mixture="free" if uniform else "channels", granularity=granularity)
    return train_mixture(request, plan, "scalearn")
