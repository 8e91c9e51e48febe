"""π-Tuning: the target's expert and the chosen ones, weights and factors trained (arXiv 2304.14381, eq. 4 and 5).

    ΔW = α_t ΔW_t + Σ_n α_n ΔW_n, with α = softmax(v)

The sum is over the updates ΔW, as in the paper's code for LoRA. Training starts from the head of the target's expert.
"""

from pimerge.tuning.method import MixturePlan, TuneMethod

METHOD = TuneMethod(
    name="interpolated",
    summary="Train the weights and factors of the target's expert and the chosen ones.",
    formula="ΔW = α_t ΔW_t + Σ_n α_n ΔW_n, α = softmax(v)",
    paper="π-Tuning, arXiv 2304.14381, equations 4 and 5",
    plan=MixturePlan(experts=True, target=True, train_weights=True, train_experts=True, ranked_start=True),
)
