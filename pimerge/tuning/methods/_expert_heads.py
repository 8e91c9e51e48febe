"""Train a head for the bare base and for each frozen expert: shared by ``ensemble`` and ``distill``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pimerge.tuning.method import MixtureKind, MixturePlan

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.tasks.examples import Examples
    from pimerge.tuning.ensemble import EnsembleModel
    from pimerge.tuning.method import TuneMethod
    from pimerge.tuning.mixed_expert import MixedExpert
    from pimerge.tuning.session import TrainingOutcome, TuneRequest

PLAN = MixturePlan(experts=True, mixture=MixtureKind.SWITCH)


@dataclass(frozen=True)
class TrainedHeads:
    """Frozen experts, each with its own trained head.

    Attributes:
        mixed: the experts in the base, one of them active at a time.
        model: the ensemble of all experts.
        outcome: combined outcome of all trainings.
        kept: training examples.
        held_out: held-out examples.
    """

    mixed: MixedExpert
    model: EnsembleModel
    outcome: TrainingOutcome
    kept: Examples
    held_out: Examples | None


def equal_weights(request: TuneRequest, examples: int) -> list[float]:
    """Weight the bare base and all experts equally."""
    count = len(request.experts) + 1
    return [1 / count] * count


def similarity_weights(request: TuneRequest, examples: int) -> list[float]:
    """Weight experts by the softmax of their expected gains, with 0 for the bare base.

    Without gains, the base has the weight 1/(N + 1), and the softmax of the experts' scores divides the rest.
    """
    from pimerge.tuning.components import gain_logits

    count = len(request.experts)
    gains = [gain for gain in request.gains or [] if gain is not None]
    if len(gains) == count:
        return _softmax([0.0, *gain_logits(gains, examples)])
    scores = [score for score in request.scores or [] if score is not None]
    if len(scores) < count:
        request.note("not all experts have a score in the ranking: they are weighted equally")
        scores = [0.0] * count
    return [1 / (count + 1), *(count / (count + 1) * share for share in _softmax(scores))]


def _softmax(logits: Sequence[float]) -> list[float]:
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def train_heads(
    request: TuneRequest, method: TuneMethod, weigh: Callable[[TuneRequest, int], list[float]]
) -> TrainedHeads:
    """Train a head for the bare base and for each expert, on frozen features.

    Args:
        method: the calling method, for messages.
        weigh: (request, number of labelled examples) → the weights of the base's probabilities, then of each expert's.
    """
    from pimerge.core.errors import PimergeError
    from pimerge.models.heads import set_head
    from pimerge.tuning.ensemble import EnsembleModel
    from pimerge.tuning.fit import mix_experts
    from pimerge.tuning.mixture import Switch

    loaded = request.session.loaded
    if not loaded.head and request.session.task.type.trains_head:
        raise PimergeError(
            f"'{method.name}' trains a head for each expert, and these experts adapt the base's own head",
            "take 'learned' or 'interpolated'",
        )
    if not loaded.head:
        raise PimergeError(
            f"'{method.name}' averages the probabilities of classes, and a base that answers in text "
            f"({request.session.task.file.type}) has no head for them",
            "take 'learned' or 'interpolated'",
        )
    mixed, kept, held_out = mix_experts(request, replace(method, plan=PLAN))
    assert isinstance(mixed.mixture, Switch)
    weights = weigh(request, len(kept) + (len(held_out) if held_out else 0))
    answering: list[int | None] = [None, *range(len(mixed.names))]
    if not mixed.chosen[0].has_strength and mixed.chosen[0].tensor_sets:
        kind = mixed.chosen[0].kind
        request.note(f"experts of kind {kind} cannot be taken out of the sum: the bare base has no vote")
        answering, weights = answering[1:], [weight / sum(weights[1:]) for weight in weights[1:]]
    start = _copy(loaded.head_tensors())
    heads, outcomes = [], []
    for expert in answering:
        mixed.mixture.choose(expert)
        set_head(loaded.model, start)
        part = "base" if expert is None else f"expert-{expert}"
        outcomes.append(mixed.train(kept, held_out, part=part, epochs=request.options.epochs / len(answering)))
        heads.append((expert, _copy(loaded.head_tensors())))
    model = EnsembleModel(mixed.model, loaded, mixed.mixture, heads, weights).eval()
    return TrainedHeads(mixed, model, _joint_outcome(outcomes), kept, held_out)


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _joint_outcome(outcomes: Sequence[TrainingOutcome]) -> TrainingOutcome:
    """Combine several trainings: sum epochs and parameters, and average losses."""
    held_out = [each.held_out_loss for each in outcomes if each.held_out_loss is not None]
    losses = [each.train_loss for each in outcomes if each.train_loss is not None]
    return replace(
        outcomes[0],
        epochs=sum(each.epochs for each in outcomes),
        held_out_losses=(),
        train_loss=sum(losses) / len(losses),
        held_out_loss=sum(held_out) / len(held_out) if held_out else None,
        trained_parameters=sum(each.trained_parameters for each in outcomes),
    )
