"""The ensemble of the chosen experts and the bare base, distilled into one expert.

    loss = −Σ_c q_c log p_c, with q = (1 − λ) Σ_n w_n p_n(·|x) + λ [c is the label]

The teacher is ``ensemble``, or with ``--teacher similarity`` its mean weighted by what the ranking expects of each
expert, after DistillWeighted (arXiv 2304.12314). The student is the sum that ``interpolated`` trains. Half of the
epochs go to the heads of the teacher. Where task.json has a split ``unlabelled``, its inputs are learned from, too,
with q the teacher's alone; they make its passes longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pimerge.tuning.methods import MixturePlan

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pimerge.tasks.examples import Batch, Examples
    from pimerge.tuning.session import TuneRequest, TuneResult

PLAN = MixturePlan(experts=True, target=True, train_weights=True, train_experts=True, ranked_start=True)
TEACHERS = ("mean", "similarity")


def fit(request: TuneRequest, *, teacher: str = "mean", label_share: float = 0.5, unlabelled: int = 500) -> TuneResult:
    """Train the teacher's heads, then the student.

    Args:
        teacher: ``mean`` or ``similarity``.
        label_share: λ of examples with a label.
        unlabelled: at most so many inputs without one.

    Raises:
        PimergeError: if an option does not fit, or the task has no classes with a head.
    """
    from pimerge.core.errors import Problems
    from pimerge.tuning.methods.ensemble import equal_weights, similarity_weights, train_heads
    from pimerge.tuning.mixed_expert import mix_experts

    problems = Problems()
    if teacher not in TEACHERS:
        problems.add(f"--teacher is '{teacher}'", f"expected {' or '.join(TEACHERS)}")
    if not 0 <= label_share <= 1:
        problems.add(f"--label-share is {label_share}, expected 0 to 1")
    if unlabelled < 0:
        problems.add(f"--unlabelled is {unlabelled}, expected 0 or more")
    problems.raise_any("the options do not fit")
    weigh = equal_weights if teacher == "mean" else similarity_weights
    half = request.options.epochs / 2
    with request.session.restored(request.options.seed):
        _, together, heads, kept, held_out = train_heads(request.with_options("teacher", epochs=half), weigh, "distill")
        shares = _soft(together, kept, label_share, request.session.device)
        more = _unlabelled(request, unlabelled)
        if more is not None:
            shares += _soft(together, more, 0.0, request.session.device)
    mixed, kept, held_out = mix_experts(request, PLAN, "distill")
    taught = _taught(kept if more is None else kept.joined(more), shares)
    outcome = mixed.train(taught, held_out, part="student", epochs=request.options.epochs - half)
    outcome = replace(outcome, epochs=heads.epochs + outcome.epochs, held_out_losses=())
    return mixed.result(outcome, taught, held_out)


def _unlabelled(request: TuneRequest, limit: int) -> Examples | None:
    from pimerge.tasks.schema import UNLABELLED

    task, loaded = request.session.task, request.session.loaded
    if not limit or not task.has_split(UNLABELLED):
        return None
    config = loaded.config_for(request.experts)
    examples, _ = task.examples(UNLABELLED, loaded.processor, config, seed=request.options.seed, limit=limit)
    request.note(f"learning from {len(examples)} inputs without a label, too")
    return examples


def _soft(teacher: nn.Module, examples: Examples, label_share: float, device: torch.device) -> list[Tensor]:
    """(classes) the shares of the classes that the student is to learn of each example, or of each of its targets."""
    import torch
    from torch.nn.functional import one_hot

    from pimerge.tasks.examples import IGNORED, bucket_by_length, on_device

    found: list[Tensor] = [torch.empty(0)] * len(examples)
    for indices in bucket_by_length(examples.lengths, 4096):
        batch = on_device(examples.batch(indices), device)
        labels = batch.pop("labels")
        with torch.no_grad():
            shares = teacher(**batch).logits.softmax(-1)
        targets = labels != IGNORED
        classes = one_hot(labels.clamp(min=0), shares.shape[-1])
        shares = (1 - label_share) * shares + label_share * classes
        for index, row, among in zip(indices, shares.float().cpu(), targets.cpu(), strict=True):
            found[index] = row[among]
    return found


def _taught(examples: Examples, shares: Sequence[Tensor]) -> Examples:
    """The examples with shares of the classes in place of labels."""
    import torch

    from pimerge.tasks.examples import IGNORED, Examples

    def get(index: int) -> Batch:
        return {**examples.get(index), "shares": shares[index]}

    def collate(batch: Sequence[Batch]) -> Batch:
        if "shares" not in batch[0]:  # those that are held out keep their labels
            return examples.collate(batch)
        plain = [{name: value for name, value in example.items() if name != "shares"} for example in batch]
        collated = examples.collate(plain)
        targets = collated["labels"] != IGNORED
        taught = torch.zeros(*targets.shape, shares[0].shape[-1])
        taught[targets] = torch.cat([example["shares"].view(-1, taught.shape[-1]) for example in batch])
        return {**collated, "labels": taught}

    return Examples(examples.lengths, get, collate)
