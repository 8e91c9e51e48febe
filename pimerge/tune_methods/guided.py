"""The chosen experts, weighted by what each is expected to gain, and a head from a probe; then all of it trained.

    w_n ∝ exp(gain_n / τ), τ = 0.1 / √(number of labelled examples)

with the gains of ``pimerge rank``; what has no gain starts from the ranking's scores as in ``learned``. The fewer
examples, the less the gains are to be trusted, and the nearer the weights are to equal. The head is the linear probe of
the composed features (:mod:`pimerge.probed_head`). Then weights, factors and head are trained, as in ``interpolated``.
"""

from pimerge.tune_methods import Plan

PLAN = Plan(
    experts=True, train_weights=True, train_experts=True, ranked_start=True, start_by_gain=True, probed_head=True
)
