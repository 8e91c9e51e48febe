"""The mean of the chosen experts, frozen; only the head trains (arXiv 2402.15414, section 3.1).

With one expert it is the control "best single expert".
"""

from pimerge.tuning.methods import MixturePlan

PLAN = MixturePlan(experts=True)
