"""Only the task head trained on the bare base: the control without any expert."""

from pimerge.tuning.methods import Plan

PLAN = Plan(fresh=True)
