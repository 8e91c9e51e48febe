"""Run a tune method on a request: put a mixture of experts into the base, train it, collapse it into one expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pimerge.core.errors import PimergeError
from pimerge.core.progress import unheard
from pimerge.models.heads import set_head
from pimerge.tasks.examples import Examples
from pimerge.tuning.class_name_examples import class_names, class_texts, names_predict
from pimerge.tuning.components import chosen_experts, form_of, require_heads_alone
from pimerge.tuning.method import MixturePlan, TuneMethod
from pimerge.tuning.mixed_expert import MixedExpert, MixedTensors, MixedUpdates
from pimerge.tuning.session import TuneRequest, TuneResult


def fit(method: TuneMethod, request: TuneRequest) -> TuneResult:
    """Run a tune method; its result stays in the base's model."""
    request = with_class_names_decided(request, method.plan)
    result: TuneResult = method.fit(request, **method.defaults) if method.fit else train_mixture(request, method)
    return replace(result, settings={**result.settings, "class_names": request.options.class_names})


def with_class_names_decided(request: TuneRequest, plan: MixturePlan) -> TuneRequest:
    """Decide the option ``class_names``: if it is None, test whether the names predict the examples.

    The base must not contain an expert.
    """
    session, taken = request.session, request.options.class_names
    if taken is None:
        taken = False
        if plan.class_names and class_texts(session.task):
            silently = replace(request, note=unheard, options=replace(request.options, class_names=False))
            taken = names_predict(session.loaded, session.task, silently.examples()[0])
    if taken:
        count = len(class_names(session.task, session.loaded.processor, session.loaded.config))
        request.note(f"the names of the {count} classes are used as one more training example of each")
    return replace(request, options=replace(request.options, class_names=taken))


def mix_experts(request: TuneRequest, method: TuneMethod) -> tuple[MixedExpert, Examples, Examples | None]:
    """Put the mixture of a method's plan into the base, and encode its examples.

    Returns:
        the mixture, the training examples, and the held-out examples.
    """
    session, plan = request.session, method.plan
    chosen = chosen_experts(method, request.experts, request.target)
    if plan.head_alone and not session.loaded.head:
        raise PimergeError(
            f"'{method.name}' trains a head alone, and a base that answers in text ({session.task.file.type}) has none "
            "to train",
            "take 'scratch' for a control without experts; 'pimerge eval' also scores the bare base",
        )
    own = [request.target] if request.target and plan.target else []
    require_heads_alone([*chosen, *own], session.loaded)
    for target in own:
        set_head(session.loaded.model, target.head_tensors())
    with form_of(plan, request, chosen) as form:
        kept, held_out = request.examples(form)
        count = len(kept) + (len(held_out) if held_out else 0)
        mixed: MixedExpert = (
            MixedUpdates(request, method, chosen, count)
            if form is None
            else MixedTensors(request, method, chosen, count, form)
        )
    mixed.mixture.to(session.device)
    return mixed, kept, held_out


def train_mixture(request: TuneRequest, method: TuneMethod) -> TuneResult:
    """Mix, train once and collapse, as most tune methods do."""
    mixed, kept, held_out = mix_experts(request, method)
    return mixed.result(mixed.train(kept, held_out), kept, held_out)


def mean_state(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Average several trained states, name by name.

    >>> mean_state([{"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}])
    {'w': tensor([0.5000])}
    """
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], way: float) -> dict[str, Tensor]:
    """Interpolate between two states, start + way · (end − start), name by name.

    >>> between({"w": torch.tensor([0.0])}, {"w": torch.tensor([2.0])}, 0.75)
    {'w': tensor([1.5000])}
    """
    return {name: start[name] + way * (end[name] - start[name]) for name in start}
