"""Only the task head trained on the bare base: the control without any expert."""

from pimerge.tuning.methods import MixturePlan

PLAN = MixturePlan(fresh=True)
