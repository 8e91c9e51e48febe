"""Run a tune method on a request."""

from __future__ import annotations

from dataclasses import replace

from pimerge.core.progress import unheard
from pimerge.tuning.class_name_examples import class_names, may_take_names, names_predict
from pimerge.tuning.method import TuneMethod
from pimerge.tuning.mix import train_mixture
from pimerge.tuning.plan import MixturePlan
from pimerge.tuning.session import TuneRequest, TuneResult


def fit(method: TuneMethod, request: TuneRequest) -> TuneResult:
    """Run a tune method; the result is left in the base's model."""
    request = with_class_names_decided(request, method.plan)
    result = train_mixture(request, method) if method.fit is None else method.fit(request, **method.defaults)
    return replace(result, settings={**result.settings, "class_names": request.options.class_names})


def with_class_names_decided(request: TuneRequest, plan: MixturePlan) -> TuneRequest:
    """Settle the option ``class_names``: where the user leaves it open, by whether the names predict the examples.

    The base must hold no expert.
    """
    session, taken = request.session, request.options.class_names
    if taken is None:
        taken = False
        if may_take_names(session.task, plan):
            silently = replace(request, note=unheard, options=replace(request.options, class_names=False))
            taken = names_predict(session.loaded, session.task, silently.examples()[0])
    if taken:
        count = len(class_names(session.task, session.loaded.processor, session.loaded.config))
        request.note(f"the names of the {count} classes are learned from, as one more example of each")
    return replace(request, options=replace(request.options, class_names=taken))
