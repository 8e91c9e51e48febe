"""``scratch`` with class names as further examples: the control of ``guided`` for text classification.

It separates the gain of the names from the gain of the experts. If the names are not texts, or do not predict the
examples, it equals ``scratch``; see :mod:`pimerge.tuning.class_name_examples`.
"""

from pimerge.tuning.method import MixturePlan, TuneMethod

METHOD = TuneMethod(
    name="named",
    summary="'scratch' that also learns from the names of the classes: the control of 'guided' for texts.",
    formula="ΔW = s B A, B and A trained",
    plan=MixturePlan(fresh=True, train_experts=True, lr=5e-3, class_names=True),
    without_names="scratch",
    control=True,
)
