"""A free coefficient per matrix and expert trained, no softmax (aTLAS, arXiv 2407.02880).

    ΔW = Σ_n λ_n ΔW_n, one λ in R^N for each adapted matrix

The paper starts from λ = 0; here it starts from the ranking's weights, as the softmax of ``learned`` does: of few
examples a start that is known to help is worth keeping. Experts without ΔW are summed around what changes nothing.
"""

from pimerge.tuning.methods import MixturePlan

PLAN = MixturePlan(experts=True, train_weights=True, ranked_start=True, mixture="free")
