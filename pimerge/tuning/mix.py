"""Mix experts inside the base of a request, and train the mixture: what every tune method is built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pimerge.core.errors import PimergeError
from pimerge.models.heads import set_head
from pimerge.tasks.examples import Examples
from pimerge.tuning.components import chosen_experts, form_of, require_heads_alone
from pimerge.tuning.method import TuneMethod
from pimerge.tuning.mixed_expert import MixedExpert
from pimerge.tuning.mixed_tensors import MixedTensors
from pimerge.tuning.mixed_updates import MixedUpdates
from pimerge.tuning.session import TuneRequest, TuneResult


def mix_experts(request: TuneRequest, method: TuneMethod) -> tuple[MixedExpert, Examples, Examples | None]:
    """Put the mixture of a method's plan into the base, and encode the examples for it.

    Returns:
        the mixture, the examples to train on, and those that are held out.
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
    """Mix, train and collapse: what most tune methods are."""
    mixed, kept, held_out = mix_experts(request, method)
    return mixed.result(mixed.train(kept, held_out), kept, held_out)


def mean_state(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several trained states, name by name.

    >>> mean_state([{"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}])
    {'w': tensor([0.5000])}
    """
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], way: float) -> dict[str, Tensor]:
    """The state start + way · (end − start), name by name.

    >>> between({"w": torch.tensor([0.0])}, {"w": torch.tensor([2.0])}, 0.75)
    {'w': tensor([1.5000])}
    """
    return {name: start[name] + way * (end[name] - start[name]) for name in start}
