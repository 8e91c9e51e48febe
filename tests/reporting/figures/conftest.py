"""A target and experts of its base, as the plots get them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pimerge.adapters.expert import Expert, open_expert
from pimerge.reporting.figures._study import Study
from pimerge.tasks.task import open_task
from tests.support.experts import MakeExpert
from tests.support.references import ByHand, summed

NAMES = ("x", "y", "z")


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory, vit_base: Path, parity_task: Path, make_expert: MakeExpert) -> Path:
    """Experts x, y, z of different ranks, and h without a head."""
    folder = tmp_path_factory.mktemp("drawn") / "experts"
    for i, name in enumerate(NAMES):
        make_expert(folder / name, vit_base, parity_task, seed=i, r=2 + i)
    make_expert(folder / "h", vit_base, parity_task, head=False)
    return folder


@pytest.fixture(scope="session")
def study(pool: Path) -> Study:
    """x is the target, y and z are the others."""
    x, y, z = (open_expert(pool / name) for name in NAMES)
    return Study(x, open_task(x.path), x.base, [y, z])


@pytest.fixture(scope="session")
def by_hand(study: Study) -> ByHand:
    """``by_hand(experts, weights)``: accuracy and loss of W0 + Σ w_n ΔW_n with dense ΔW, example by example."""

    def score(experts: list[Expert], weights: list[float]) -> tuple[float, float]:
        model, task = summed(study, experts, weights), study.task
        examples, labels = task.examples("test", task.type.load_processor(study.base.source, None), model.config)
        right, losses = [], []
        for index, label in enumerate(labels):
            with torch.no_grad():
                logits = model(pixel_values=examples.batch([index])["pixel_values"]).logits[0]
            right.append(int(logits.argmax()) == label)
            losses.append(-float(logits.log_softmax(0)[label]))
        return sum(right) / len(right), sum(losses) / len(losses)

    return score
