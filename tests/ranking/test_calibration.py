"""Gains in accuracy within a pool, against folds and fits in an explicit loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pimerge.adapters.expert import open_expert
from pimerge.checkpoints.base import find_base
from pimerge.core.errors import PimergeError
from pimerge.embedding.features import FeatureReader, Sampling, TargetFeatures
from pimerge.embedding.strengths import STRENGTHS
from pimerge.models.linear_probe import PENALTIES, probe_folds
from pimerge.models.loading import load_base
from pimerge.ranking.calibration import held_out_accuracy, measure_gains
from pimerge.tasks.task import open_task
from tests.support.experts import MakeExpert
from tests.support.references import dense_model, features
from tests.support.samples import sample_of


def accuracy_by_hand(sample: TargetFeatures) -> float:
    """Scikit-learn's logistic regression, fold by fold; the penalty with the highest held-out likelihood."""
    fold = probe_folds(sample.labels, 5, seed=0).numpy()
    x, labels = sample.vectors.numpy(), sample.labels.numpy()
    best, accuracy = -np.inf, 0.0
    for penalty in PENALTIES:
        likelihood, right, asked = 0.0, 0, 0
        for index in range(fold.max() + 1):
            train, held = fold != index, fold == index
            centre = x[train].mean(0)
            size = np.sqrt(((x[train] - centre) ** 2).sum(1).mean())
            own = penalty / 2 if sample.classes == 2 else penalty  # of two classes it has one vector: ours are ±w/2
            model = LogisticRegression(C=1 / own, tol=1e-6, max_iter=1000)
            model.fit((x[train] - centre) / size, labels[train])
            found = model.predict_log_proba((x[held] - centre) / size)
            likelihood += sum(row[label] for row, label in zip(found, labels[held], strict=True))
            right += int((found.argmax(1) == labels[held]).sum())
            asked += int(held.sum())
        if likelihood > best:
            best, accuracy = likelihood, right / asked
    return accuracy


@pytest.mark.parametrize("signal", [0.0, 0.6, 3.0])
def test_it_is_the_accuracy_of_logistic_regressions_on_held_out_folds(signal: float) -> None:
    sample = sample_of(signal)
    assert held_out_accuracy(sample) == pytest.approx(accuracy_by_hand(sample), abs=1e-12)


def test_the_only_example_of_a_class_is_never_asked() -> None:
    sample = sample_of(3.0, torch.cat([torch.arange(20) % 2, torch.tensor([2])]))
    assert held_out_accuracy(sample) == pytest.approx(accuracy_by_hand(sample), abs=1e-12)


def test_every_expert_is_measured_at_every_scale_over_the_base(
    vit_base: Path, parity_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    task, base = open_task(parity_task), find_base(str(vit_base), None, vit_base)
    reader = FeatureReader(load_base(base, task, torch.device("cpu"), torch.float32), base, task, Sampling(limit=30))
    labels = reader.labels
    experts = {
        name: open_expert(make_expert(tmp_path / name, vit_base, parity_task, seed=seed, lora_alpha=100))
        for seed, name in enumerate(("a", "b"))
    }
    found = measure_gains(reader, experts)
    assert (found.task_sha256, found.examples) == (task.sha256(), 30)
    bare = accuracy_by_hand(TargetFeatures(features(dense_model(vit_base, [], []), "vit", reader).double(), labels, 2))
    for name, expert in experts.items():
        sha256, by_scale = found.sources[name]
        assert sha256 == expert.sha256
        expected = {}
        for scale in STRENGTHS:
            vectors = features(dense_model(vit_base, [expert], [scale]), "vit", reader)
            expected[str(scale)] = accuracy_by_hand(TargetFeatures(vectors.double(), labels, 2)) - bare
        assert by_scale == pytest.approx(expected, abs=1e-12)
    assert len({gain for _, by_scale in found.sources.values() for gain in by_scale.values()}) > 1


def test_one_example_a_class_cannot_be_calibrated() -> None:
    with pytest.raises(PimergeError, match="every class has one example"):
        held_out_accuracy(sample_of(1.0, torch.arange(4)))
