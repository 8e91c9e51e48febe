"""A fresh LoRA trained on the target alone: the control, and how the experts of a pool are made.

Experts made with the same base, rank, modules and ``--init-seed`` share one init, so they can be compared by
their Fisher.
"""

from pimerge.tuning.methods import MixturePlan

PLAN = MixturePlan(fresh=True, train_experts=True, lr=5e-3)
