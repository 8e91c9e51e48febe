"""Train a fresh LoRA on the target alone: the control, and how the experts of a pool are made.

Experts with the same base, rank, modules and ``--init-seed`` share one init, so that their Fisher embeddings
can be compared.
"""

from pimerge.tuning.method import MixturePlan, TuneMethod

METHOD = TuneMethod(
    name="scratch",
    summary="Train a fresh LoRA on the target alone: the control, and how a pool's experts are made.",
    formula="ΔW = s B A, B and A trained",
    plan=MixturePlan(fresh=True, train_experts=True, lr=5e-3),
    control=True,
)
