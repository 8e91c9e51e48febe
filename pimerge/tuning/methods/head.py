"""Train only the task head, on the bare base: the control without any expert."""

from pimerge.tuning.method import MixturePlan, TuneMethod

METHOD = TuneMethod(
    name="head",
    summary="Train the task head alone on the bare base: the control without any expert.",
    formula="ΔW = 0",
    plan=MixturePlan(fresh=True),
    control=True,
)
