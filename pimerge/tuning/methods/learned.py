"""Softmax weights per matrix trained, experts frozen: ΔW = Σ softmax(v)_n ΔW_n (arXiv 2402.15414, section 3.2)."""

from pimerge.tuning.methods import MixturePlan

PLAN = MixturePlan(experts=True, train_weights=True, ranked_start=True)
