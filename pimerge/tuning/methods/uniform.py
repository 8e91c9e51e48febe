"""The mean of the chosen experts, frozen; only the head trains (arXiv 2402.15414, section 3.1).

With one expert, it is the control "best single expert".
"""

from pimerge.tuning.method import MixturePlan, TuneMethod

METHOD = TuneMethod(
    name="uniform",
    summary="Take the mean of the chosen experts, frozen, and train the head.",
    formula="ΔW = 1/N · Σ_n ΔW_n",
    paper="arXiv 2402.15414, section 3.1",
    plan=MixturePlan(experts=True),
    control=True,
)
