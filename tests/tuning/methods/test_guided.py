"""The default: where its training starts, against a dense sum and a probe of its features, and how far it goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pimerge.adapters.expert import Expert, open_expert
from pimerge.models.linear_probe import fit_probe
from pimerge.tasks.task import open_task
from pimerge.tuning.fit import fit
from pimerge.tuning.method import open_tune_method
from pimerge.tuning.methods import guided
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.run import manifest_of
from pimerge.tuning.session import TuneRequest, TuningSession, open_session
from tests.support.bases import model_for
from tests.support.experts import MakeExpert, dense_deltas
from tests.support.numerics import relative_difference

GAINS = [0.04, 0.01]
OPTIONS = TrainingOptions(epochs=3, shots=6, batch_size=4, lr=1e-2, holdout=0.0)
WEIGHT, BIAS = "classifier.weight", "classifier.bias"


@pytest.fixture(scope="module")
def pool(
    tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, vit_base: Path, parity_task: Path
) -> tuple[TuningSession, list[Expert]]:
    folder = tmp_path_factory.mktemp("guided")
    a, b = (open_expert(make_expert(folder / name, vit_base, parity_task, seed=n)) for n, name in enumerate("ab"))
    return open_session(open_task(parity_task), a.base, "cpu"), [a, b.with_strength(0.5)]


def tuned(
    pool: tuple[TuningSession, list[Expert]], folder: Path, way: float, monkeypatch: pytest.MonkeyPatch
) -> Expert:
    """What is written by a method that goes so far."""
    monkeypatch.setattr(guided, "WAY", way)
    session, experts = pool
    method = open_tune_method("guided")
    with session.restored(0) as undo:
        request = TuneRequest(
            session, experts, None, experts[0], [0.9, 0.8], OPTIONS, folder / f"run-{way}", GAINS, undo=undo
        )
        result = fit(method, request)
        result.write(folder / str(way), manifest_of(method, request, result, experts), False)
    return open_expert(folder / str(way))


def head_of(expert: Expert) -> Tensor:
    """(classes × (d + 1)) weight and bias."""
    head = expert.head_tensors()
    return torch.cat([head[WEIGHT], head[BIAS][:, None]], 1).double()


def test_it_starts_from_experts_by_their_gains_under_the_probe_of_their_sum(
    pool: tuple[TuningSession, list[Expert]], vit_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tuned(pool, tmp_path, 0.0, monkeypatch)
    session, experts = pool
    examples, labels = session.task.examples("train", session.loaded.processor, session.loaded.config, shots=6)
    # 12 examples: the temperature is 0.1 / √12
    weights = torch.tensor(GAINS, dtype=torch.float64).mul(12**0.5 / 0.1).softmax(0).tolist()
    model = model_for(vit_base).double()
    updates = [dense_deltas(expert) for expert in experts]
    for name, delta in dense_deltas(found).items():
        update = torch.stack([w * each[name] for w, each in zip(weights, updates, strict=True)]).sum(0)
        assert relative_difference(delta, update) < 1e-5
        model.get_parameter(f"{name}.weight").data.add_(update)
    vectors: list[Tensor] = []
    model.get_submodule("classifier").register_forward_pre_hook(lambda _, given: vectors.append(given[0].detach()[0]))
    for index in range(len(examples)):
        model(pixel_values=examples.get(index)["pixel_values"][None].double())
    features = torch.stack(vectors)
    head = head_of(found)
    answers = (features @ head[:, :-1].T + head[:, -1]).log_softmax(-1)
    expected = fit_probe(features, torch.tensor(labels), 2, 0.1).log_probabilities(features)
    torch.testing.assert_close(answers, expected, atol=1e-4, rtol=1e-4)


def test_it_goes_three_quarters_of_the_way(
    pool: tuple[TuningSession, list[Expert]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_it_is = guided.WAY
    start, end, found = (head_of(tuned(pool, tmp_path, way, monkeypatch)) for way in (0.0, 1.0, as_it_is))
    assert relative_difference(start, end) > 0.1
    torch.testing.assert_close(found, 0.25 * start + 0.75 * end, atol=1e-6, rtol=1e-5)
