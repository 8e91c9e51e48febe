"""Train softmax weights per matrix of frozen experts (arXiv 2402.15414, section 3.2).

ΔW = Σ_n softmax(v)_n ΔW_n, one v in R^N for each adapted matrix
"""

from pimerge.tuning.method import MixturePlan, TuneMethod

METHOD = TuneMethod(
    name="learned",
    summary="Train softmax weights per matrix; the experts stay frozen.",
    formula="ΔW = Σ_n softmax(v)_n ΔW_n",
    paper="arXiv 2402.15414, section 3.2",
    plan=MixturePlan(experts=True, train_weights=True, ranked_start=True),
)
