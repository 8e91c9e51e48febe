"""Train a free weight per matrix and expert, without a softmax (aTLAS, arXiv 2407.02880).

    ΔW = Σ_n λ_n ΔW_n, one λ in R^N for each adapted matrix

The paper starts from λ = 0; here λ starts from the ranking's weights, as in ``learned``, which helps with few examples.
Experts without ΔW are summed around their neutral point.
"""

from pimerge.tuning.method import MixtureKind, MixturePlan, TuneMethod

METHOD = TuneMethod(
    name="anisotropic",
    summary="Train a free weight per matrix and expert; no softmax.",
    formula="ΔW = Σ_n λ_n ΔW_n",
    paper="aTLAS, arXiv 2407.02880",
    plan=MixturePlan(experts=True, train_weights=True, ranked_start=True, mixture=MixtureKind.FREE),
)
