"""π-Tuning with fresh experts in place of the chosen ones: the control "without init" (arXiv 2304.14381, section 4).

What it has in common with ``interpolated`` is the number of parameters; what it lacks is what the experts know.
"""

from pimerge.tuning.methods import MixturePlan

PLAN = MixturePlan(experts=True, target=True, random_experts=True, train_weights=True, train_experts=True)
