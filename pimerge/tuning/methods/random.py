"""π-Tuning with fresh experts in place of the chosen ones: the control "without init" (arXiv 2304.14381, section 4).

It trains as many parameters as ``interpolated``, without the knowledge of the experts.
"""

from pimerge.tuning.method import MixturePlan, TuneMethod

METHOD = TuneMethod(
    name="random",
    summary="'interpolated' with fresh experts in place of the chosen ones: the control for the experts' knowledge.",
    formula="ΔW = α_t ΔW_t + Σ_n α_n ΔW_n, α = softmax(v), ΔW_n fresh",
    paper="π-Tuning, arXiv 2304.14381, section 4",
    plan=MixturePlan(experts=True, target=True, random_experts=True, train_weights=True, train_experts=True),
    control=True,
)
