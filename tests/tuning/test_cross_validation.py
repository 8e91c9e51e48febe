"""Learning rate and epochs from folds, against a plain loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from pimerge.tasks.task import open_task
from pimerge.tuning.cross_validation import FACTORS, FOLDS, choose
from pimerge.tuning.fit import fit
from pimerge.tuning.loss import held_out_loss
from pimerge.tuning.method import MixturePlan, TuneMethod, open_tune_method
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.session import TuneRequest, TuneResult, TuningSession, open_session
from pimerge.tuning.trainer import Diverged, untrained
from tests.support.experts import MakeExpert

OPTIONS = TrainingOptions(epochs=3, shots=6, batch_size=8, lr=0.02, label_smoothing=0.0)


@pytest.fixture(scope="module")
def session(
    tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, vit_base: Path, parity_task: Path
) -> Any:
    folder = tmp_path_factory.mktemp("cv")
    experts = [open_expert(make_expert(folder / name, vit_base, parity_task, seed=n)) for n, name in enumerate("xab")]
    return open_session(open_task(parity_task), experts[0].base, "cpu"), experts


def request_of(
    session: tuple[TuningSession, Sequence[Any]], run: Path, options: TrainingOptions = OPTIONS, **fields: Any
) -> TuneRequest:
    opened, (x, *others) = session
    return TuneRequest(opened, others, x, x, None, options, run, **fields)


def test_the_lowest_mean_held_out_loss_is_taken(session: Any, tmp_path: Path) -> None:
    method = open_tune_method("learned")
    tried: dict[tuple[float, int], float] = {}
    for factor in FACTORS:
        losses = []
        for fold in range(FOLDS):
            options = replace(OPTIONS, lr=OPTIONS.lr * factor, holdout=0.0, patience=100)
            with session[0].restored(0) as undo:
                run = tmp_path / f"{factor}-{fold}"
                request = request_of(session, run, options, undo=undo, fold=(fold, FOLDS))
                result = fit(method, request)
                kept, held_out = request.examples()
                assert held_out is not None
                assert len(kept) + len(held_out) == 12
                end = held_out_loss(result.model, held_out, torch.device("cpu"))
                assert min(result.outcome.held_out_losses) == pytest.approx(end)  # the best state is in it
                losses.append(result.outcome.held_out_losses)
        for epoch, each in enumerate(zip(*losses, strict=True), 1):
            tried[OPTIONS.lr * factor, epoch] = sum(each) / FOLDS
    lr, epochs = min(tried, key=lambda choice: tried[choice])
    found = choose(method, request_of(session, tmp_path / "cv"))
    assert (found.lr, found.stop_after, found.holdout) == (lr, epochs, 0.0)
    assert replace(found, lr=OPTIONS.lr, stop_after=None, holdout=OPTIONS.holdout) == OPTIONS


def method_of(fit: Callable[[TuneRequest], TuneResult]) -> TuneMethod:
    """A method whose default learning rate is 1."""
    return TuneMethod(name="fake", summary="", formula="", plan=MixturePlan(lr=1.0), fit=fit)


def result_of(request: TuneRequest, losses: Sequence[float]) -> TuneResult:
    """A result with these held-out losses, one after each epoch."""
    return TuneResult(
        model=request.session.loaded.model,
        outcome=replace(untrained(), held_out_losses=tuple(losses)),
        experts=[],
        weights={},
        scales=[],
        examples=0,
        held_out=0,
        rank=0,
        truncation=0.0,
        deployed_parameters=0,
        settings={},
        write=lambda *_: None,
    )


def fake(losses: dict[float, Sequence[float] | None]) -> TuneMethod:
    """A method whose held-out losses by learning rate are known; None for one that diverges."""

    def fit(request: TuneRequest) -> TuneResult:
        assert request.options.lr is not None
        found = losses[request.options.lr]
        if found is None:
            raise Diverged("it diverged")
        return result_of(request, found)

    return method_of(fit)


def test_of_several_trainings_the_results_loss_counts(session: Any, tmp_path: Path) -> None:
    def fit(request: TuneRequest) -> TuneResult:
        with torch.no_grad():  # the nearer 3 the learning rate, the nearer uniform the answers
            for parameter in request.session.loaded.head_parameters():
                parameter.copy_(parameter * 1000 * abs(3.0 - (request.options.lr or 0.0)))
        return result_of(request, [])

    found = choose(method_of(fit), request_of(session, tmp_path, replace(OPTIONS, lr=None)))
    assert (found.lr, found.stop_after) == (3.0, None)


def test_what_diverges_on_a_fold_is_not_taken(session: Any, tmp_path: Path) -> None:
    said: list[str] = []
    request = request_of(session, tmp_path, replace(OPTIONS, lr=None), note=said.append)
    method = fake({0.3: [0.9, 0.7, 0.8], 1.0: [0.8, math.nan, math.nan], 3.0: None})
    found = choose(method, request)
    assert (found.lr, found.stop_after) == (0.3, 2)
    assert said == [
        "on 3 folds: held-out loss 0.700 at --lr 0.3, held-out loss 0.800 at --lr 1, held-out loss inf at --lr 3; "
        "chosen: 0.3, for 2 epochs"
    ]


def test_where_all_diverge_it_says_so(session: Any, tmp_path: Path) -> None:
    method = fake({0.3: None, 1.0: [math.nan], 3.0: None})
    with pytest.raises(PimergeError, match=r"diverged at every learning rate from 0.3 on.*\n.*lower --lr"):
        choose(method, request_of(session, tmp_path, replace(OPTIONS, lr=None)))


def test_of_one_example_a_class_nothing_is_chosen(session: Any, tmp_path: Path) -> None:
    said: list[str] = []
    options = replace(OPTIONS, shots=1)
    method = fake({})
    assert choose(method, request_of(session, tmp_path, options, note=said.append)) == replace(options, holdout=0.0)
    assert "nothing can be held out" in said[0]
