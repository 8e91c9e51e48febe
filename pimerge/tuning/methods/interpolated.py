"""π-Tuning: the target's expert and the chosen ones, weights and factors trained (arXiv 2304.14381, eq. 4 and 5).

The sum is taken in ΔW space, φ̂ = α_t φ_t + Σ α_j φ_j with α a softmax, as the paper's code does for LoRA. The
head starts from that of the target's expert.
"""

from pimerge.tuning.methods import MixturePlan

PLAN = MixturePlan(experts=True, target=True, train_weights=True, train_experts=True, ranked_start=True)
