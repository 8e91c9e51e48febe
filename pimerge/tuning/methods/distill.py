"""The ensemble of the chosen experts and the bare base, distilled into one expert.

    loss = −Σ_c q_c log p_c, with q = (1 − λ) Σ_n w_n p_n(·|x) + λ [c is the label]

The teacher is ``ensemble``; with ``--teacher similarity``, experts are weighted by their expected gains in the ranking,
after DistillWeighted (arXiv 2304.12314). The student is the mixture that ``interpolated`` trains. The heads of the
teacher take half of the epochs. If task.json has a split ``unlabelled``, the student also learns from its inputs, with
the teacher's q alone, which makes its passes longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING

from pimerge.core.plugins import Option
from pimerge.tuning.method import MixturePlan, TuneMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pimerge.tasks.examples import Batch, Examples
    from pimerge.tuning.session import TuneRequest, TuneResult


class Teacher(StrEnum):
    """Weights of the ensemble's votes."""

    MEAN = "mean"
    SIMILARITY = "similarity"


def fit(request: TuneRequest, *, teacher: str, label_share: float, unlabelled: int) -> TuneResult:
    """Train the teacher's heads, then the student."""
    from pimerge.tuning.fit import mix_experts
    from pimerge.tuning.methods._expert_heads import equal_weights, similarity_weights, train_heads

    weigh = equal_weights if teacher == Teacher.MEAN else similarity_weights
    half, device = request.options.epochs / 2, request.session.device
    with request.session.restored(request.options.seed):
        trained = train_heads(request.with_options("teacher", epochs=half), METHOD, weigh)
        targets = _soft_targets(trained.model, trained.kept, label_share, device)
        more = _unlabelled(request, unlabelled)
        if more is not None:
            targets += _soft_targets(trained.model, more, 0.0, device)
    mixed, kept, held_out = mix_experts(request, METHOD)
    taught = _with_targets(kept if more is None else kept.joined(more), targets)
    outcome = mixed.train(taught, held_out, part="student", epochs=request.options.epochs - half)
    outcome = replace(outcome, epochs=trained.outcome.epochs + outcome.epochs, held_out_losses=())
    return mixed.result(outcome, taught, held_out)


def _unlabelled(request: TuneRequest, limit: int) -> Examples | None:
    from pimerge.tasks.schema import UNLABELLED

    task, loaded = request.session.task, request.session.loaded
    if not limit or not task.has_split(UNLABELLED):
        return None
    config = loaded.config_for(request.experts)
    examples, _ = task.examples(UNLABELLED, loaded.processor, config, seed=request.options.seed, limit=limit)
    request.note(f"also learning from {len(examples)} inputs without a label")
    return examples


def _soft_targets(teacher: nn.Module, examples: Examples, label_share: float, device: torch.device) -> list[Tensor]:
    """The student's target distribution for each example, (C), or for each of its targets, (targets, C)."""
    import torch
    from torch.nn.functional import one_hot

    from pimerge.tasks.examples import IGNORED, bucket_by_length, on_device

    found: list[Tensor] = [torch.empty(0)] * len(examples)
    for indices in bucket_by_length(examples.lengths, 4096):
        batch = on_device(examples.batch(indices), device)
        labels = batch.pop("labels")
        with torch.no_grad():
            distribution = teacher(**batch).logits.softmax(-1)
        targets = labels != IGNORED
        classes = one_hot(labels.clamp(min=0), distribution.shape[-1])
        distribution = (1 - label_share) * distribution + label_share * classes
        for index, row, among in zip(indices, distribution.float().cpu(), targets.cpu(), strict=True):
            found[index] = row[among]
    return found


def _with_targets(examples: Examples, distributions: Sequence[Tensor]) -> Examples:
    """Replace labels by distributions over the classes."""
    import torch

    from pimerge.tasks.examples import IGNORED, Examples

    def get(index: int) -> Batch:
        return {**examples.get(index), "distribution": distributions[index]}

    def collate(batch: Sequence[Batch]) -> Batch:
        if "distribution" not in batch[0]:  # held-out examples keep labels
            return examples.collate(batch)
        plain = [{name: value for name, value in example.items() if name != "distribution"} for example in batch]
        collated = examples.collate(plain)
        targets = collated["labels"] != IGNORED
        taught = torch.zeros(*targets.shape, distributions[0].shape[-1])
        taught[targets] = torch.cat([example["distribution"].view(-1, taught.shape[-1]) for example in batch])
        return {**collated, "labels": taught}

    return Examples(examples.lengths, get, collate)


METHOD = TuneMethod(
    name="distill",
    summary="Distil the ensemble of the chosen experts and the bare base into one expert.",
    formula="loss = −Σ_c q_c log p_c, q = (1 − λ) Σ_n w_n p_n + λ [c is the label]",
    paper="similarity weights: DistillWeighted, arXiv 2304.12314",
    plan=MixturePlan(experts=True, target=True, train_weights=True, train_experts=True, ranked_start=True),
    fit=fit,
    options={
        Option("teacher", Teacher, "Weights of the experts' votes: equal, or from the ranking."): "mean",
        Option(
            "label_share",
            float,
            "Weight λ of the labels against the teacher.",
            lambda x: 0 <= x <= 1,
            "from 0 to 1",
        ): 0.5,
        Option("unlabelled", int, "Maximum number of unlabelled inputs.", lambda n: n >= 0, "at least 0"): 500,
    },
)
