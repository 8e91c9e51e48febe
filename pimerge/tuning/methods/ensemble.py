"""The mean of the probabilities of the chosen experts and the bare base, each with a head of its own.

    p(y|x) = 1/(N + 1) · (p_0(y|x) + Σ_n p_n(y|x))

Experts are frozen, and the epochs are divided among the N + 1 heads. The result is N + 1 experts in one folder, with
``ensemble.json``, and costs as many forwards; ``distill`` makes one expert of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pimerge.tuning.methods import MixturePlan

if TYPE_CHECKING:
    from pimerge.core.manifest import Manifest
    from pimerge.tasks.examples import Examples
    from pimerge.tuning.ensemble import EnsembleModel
    from pimerge.tuning.mixed_expert import MixedExpert
    from pimerge.tuning.session import TuneRequest, TuneResult
    from pimerge.tuning.trainer import TrainingOutcome

PLAN = MixturePlan(experts=True, mixture="switch")
BASE = "(base)"


def fit(request: TuneRequest) -> TuneResult:
    """Train the heads.

    Raises:
        PimergeError: if the task has no classes with a head.
    """
    from pimerge.adapters.low_rank import relative_error
    from pimerge.adapters.writer import Documents
    from pimerge.tuning.session import TuneResult

    mixed, together, outcome, kept, held_out = train_heads(request, equal_weights, "ensemble")
    parts = []
    for expert, head in together.heads:
        together.switch.choose(expert)
        parts.append((mixed.collapse(1 if expert is None else request.options.rank), mixed.head(head)))
    names = [BASE if expert is None else mixed.names[expert] for expert, _ in together.heads]

    def write(output: Path, manifest: Manifest, force: bool) -> None:
        from pimerge.adapters.expert import TASK, open_expert
        from pimerge.core.files import json_text, new_folder, sha256_bytes, write_into
        from pimerge.core.manifest import MANIFEST_FILE
        from pimerge.tuning.ensemble import ENSEMBLE_FILE, EnsembleDocument, EnsembleExpert

        with new_folder(output, force=force) as partial:
            members = []
            for number, ((part, head), name, weight) in enumerate(zip(parts, names, together.weights, strict=True)):
                folder = f"{number}-{name.strip('()')}"
                part.write(partial / folder, head, Documents(manifest), False)
                sha256 = open_expert(partial / folder, request.session.base.reference).sha256
                members.append(EnsembleExpert(path=folder, sha256=sha256, weight=weight))
            contents = {
                ENSEMBLE_FILE: json_text(EnsembleDocument(members=members).model_dump()),
                TASK: json_text(request.session.task.document_for(output)),
            }
            outputs = {name: sha256_bytes(content.encode()) for name, content in contents.items()}
            contents[MANIFEST_FILE] = json_text(manifest.model_copy(update={"outputs": outputs}).model_dump())
            write_into(partial, contents)

    return TuneResult(
        model=together,
        outcome=outcome,
        experts=names,
        weights={"probabilities": list(together.weights)},
        scales=[1.0 if expert is None else mixed.chosen[expert].strength for expert, _ in together.heads],
        examples=len(kept),
        held_out=len(held_out) if held_out else 0,
        rank=max(part.rank for part, _ in parts),
        truncation=relative_error([summary for part, _ in parts for summary in part.summaries]),
        deployed_parameters=sum(part.size + sum(t.numel() for t in head.tensors.values()) for part, head in parts),
        settings={"scales": [expert.strength for expert in mixed.chosen]},
        write=write,
    )


def equal_weights(request: TuneRequest, examples: int) -> list[float]:
    """The same share for the bare base and each of the experts."""
    count = len(request.experts) + 1
    return [1 / count] * count


def similarity_weights(request: TuneRequest, examples: int) -> list[float]:
    """The softmax of the expected gains at the temperature of so many examples; the bare base has a gain of 0.

    Without gains: 1/(N + 1) for the base, and of the rest the softmax of the ranking's scores for the experts.
    """
    from pimerge.tuning.components import gain_logits

    count = len(request.experts)
    gains = [gain for gain in request.gains or [] if gain is not None]
    if len(gains) == count:
        return _softmax([0.0, *gain_logits(gains, examples)])
    scores = [score for score in request.scores or [] if score is not None]
    if len(scores) < count:
        request.note("not all experts have a score in the ranking: they are weighed equally")
        scores = [0.0] * count
    return [1 / (count + 1), *(count / (count + 1) * share for share in _softmax(scores))]


def _softmax(logits: Sequence[float]) -> list[float]:
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def train_heads(
    request: TuneRequest, weigh: Callable[[TuneRequest, int], list[float]], method: str
) -> tuple[MixedExpert, EnsembleModel, TrainingOutcome, Examples, Examples | None]:
    """Train a head for the bare base and for each expert, on frozen features.

    Args:
        weigh: the request and the number of labelled examples → the weights of the base's probabilities, then of each
            expert's.

    Raises:
        PimergeError: if the task has no classes with a head.
    """
    from pimerge.core.errors import PimergeError
    from pimerge.models.heads import set_head
    from pimerge.tuning.ensemble import EnsembleModel
    from pimerge.tuning.lora_layers import Switch
    from pimerge.tuning.mixed_expert import mix_experts

    loaded = request.session.loaded
    if not loaded.head:
        raise PimergeError(
            f"'{method}' averages the probabilities of classes, and a base that answers in text "
            f"({request.session.task.file.type}) has no head for them",
            "take 'learned' or 'interpolated'",
        )
    mixed, kept, held_out = mix_experts(request, PLAN, method)
    assert isinstance(mixed.mixture, Switch)
    weights = weigh(request, len(kept) + (len(held_out) if held_out else 0))
    start = {name: tensor.clone() for name, tensor in loaded.head_tensors().items()}
    answering: list[int | None] = [None, *range(len(mixed.names))]
    if not mixed.chosen[0].has_strength and mixed.chosen[0].tensor_sets:
        request.note(
            f"experts of kind {mixed.chosen[0].kind} cannot be taken out of the sum: the bare base has no vote"
        )
        answering, weights = answering[1:], [weight / sum(weights[1:]) for weight in weights[1:]]
    heads, outcomes = [], []
    for expert in answering:
        mixed.mixture.choose(expert)
        set_head(loaded.model, start)
        part = "base" if expert is None else f"expert-{expert}"
        outcomes.append(mixed.train(kept, held_out, part=part, epochs=request.options.epochs / len(answering)))
        heads.append((expert, {name: tensor.clone() for name, tensor in loaded.head_tensors().items()}))
    together = EnsembleModel(mixed.model, loaded, mixed.mixture, heads, weights).eval()
    held = [outcome.held_out_loss for outcome in outcomes if outcome.held_out_loss is not None]
    losses = [outcome.train_loss for outcome in outcomes if outcome.train_loss is not None]
    outcome = replace(
        outcomes[0],
        epochs=sum(each.epochs for each in outcomes),
        held_out_losses=(),
        train_loss=sum(losses) / len(losses),
        held_out_loss=sum(held) / len(held) if held else None,
        trained_parameters=sum(each.trained_parameters for each in outcomes),
    )
    return mixed, together, outcome, kept, held_out
