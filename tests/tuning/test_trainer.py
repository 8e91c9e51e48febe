"""The loss that is trained against the formula: the Trainer takes it for training and for held-out examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from pimerge.adapters.expert import open_expert
from pimerge.checkpoints.base import find_base
from pimerge.models.loading import load_base
from pimerge.tasks.sampling import split_holdout
from pimerge.tasks.task import open_task
from pimerge.tuning.loss import mean_loss
from pimerge.tuning.options import TrainingOptions
from tests.support.bases import LANGUAGE_MODELS, model_for
from tests.support.experts import MakeExpert
from tests.support.numerics import logits_of
from tests.support.tasks import write_text_task
from tests.support.tuning import tune

CPU = torch.device("cpu")


def by_hand(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> float:
    """The mean over targets of −Σ_c q_c log p_c, one target at a time."""
    losses = []
    for row, label in zip(logits.reshape(-1, logits.shape[-1]), labels.flatten(), strict=True):
        if label == -100:
            continue
        target = torch.full_like(row, smoothing / len(row))
        target[label] += 1 - smoothing
        losses.append(float(-(target * row.log_softmax(0)).sum()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("shape", [(5,), (3, 4)])
def test_the_loss_is_the_smoothed_mean_over_targets(shape: tuple[int, ...], smoothing: float) -> None:
    logits = torch.randn(*shape, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(torch.Size(shape).numel()).reshape(shape) % 7
    labels.flatten()[1] = -100
    found = mean_loss(SimpleNamespace(logits=logits), labels, label_smoothing=smoothing)
    assert float(found) == pytest.approx(by_hand(logits, labels, smoothing), rel=1e-12)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_training_and_held_out_loss_are_that_of_the_mixed_model(
    language_base: Callable[[str], Path], make_expert: MakeExpert, tmp_path: Path, name: str, smoothing: float
) -> None:
    """With a learning rate of next to nothing, both are the loss of the expert as it came."""
    folder, task = language_base(name), write_text_task(tmp_path / "task", name)
    target = open_expert(make_expert(tmp_path / "x", folder, task, lora_dropout=0.0))
    base, opened = find_base(str(folder), None, folder), open_task(task)
    options = TrainingOptions(
        epochs=1, lr=1e-12, weights_lr=1e-12, batch_size=64, holdout=0.25, label_smoothing=smoothing
    )
    result = tune("interpolated", opened, base, [target], target, tmp_path / "out", options, device="cpu")
    model = PeftModel.from_pretrained(model_for(folder), target.path).eval()
    loaded = load_base(base, opened, CPU, torch.float32)
    examples, labels = opened.examples("train", loaded.processor, loaded.config)
    expected = []
    for indices in split_holdout(labels, 0.25, 0):
        batch = examples.batch(indices)
        expected.append(by_hand(logits_of(model, batch), batch["labels"], smoothing))
    assert (result.outcome.train_loss, result.outcome.held_out_loss) == pytest.approx(expected, rel=1e-5)


def test_the_loss_leaves_out_what_a_prompt_puts_before_a_text() -> None:
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, -100, 2], [1, 1, -100]])
    found = mean_loss(SimpleNamespace(logits=logits), labels)
    torch.testing.assert_close(found, mean_loss(SimpleNamespace(logits=logits[:, 2:]), labels))
