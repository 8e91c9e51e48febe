"""A tuning that was killed goes on to the same bytes as one that was not.

BERT trains with dropout, so the random state has to come back, too; and the run is one that early stopping ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pimerge.adapters.expert import open_expert
from pimerge.core.errors import AlreadyDone
from pimerge.core.progress import Advance, Track, silent
from pimerge.tasks.task import open_task
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.session import TuneResult
from tests.support.cli import Interrupt, interrupted_after
from tests.support.experts import MakeExpert
from tests.support.tuning import tune

LONG = TrainingOptions(epochs=10, shots=10, batch_size=8, lr=0.3, patience=3, holdout=0.4)
STEPS = 2  # of an epoch: 2 × 10 examples, 12 of which train, in batches of 8


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, bert_base: Path, text_task: Path
) -> Path:
    """A folder with two experts and ``tuned``, of a run that early stopping has ended."""
    folder = tmp_path_factory.mktemp("resume")
    for seed, name in enumerate(("x", "a")):
        make_expert(folder / name, bert_base, text_task, seed=seed)
    resumable(folder, "tuned", silent)
    return folder


def resumable(folder: Path, name: str, track: Track, note: Callable[[str], None] = lambda message: None) -> TuneResult:
    x, a = (open_expert(folder / name) for name in ("x", "a"))
    return tune(
        "interpolated",
        open_task(folder / "x"),
        x.base,
        [a],
        x,
        folder / name,
        LONG,
        scores=[0.3],
        track=track,
        note=note,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def checkpoints(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f".{name}.training-*/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def last_epoch(folder: Path) -> int:
    return int(json.loads((folder / "tuned" / "pimerge.json").read_text())["results"]["epochs"])


def test_the_run_to_resume_is_ended_by_early_stopping(uninterrupted: Path) -> None:
    """A check of this file's own fixture."""
    assert LONG.patience < last_epoch(uninterrupted) < LONG.epochs


@pytest.mark.parametrize("before_end", [1, 6])  # the first while it waits for a better loss
def test_a_run_killed_within_an_epoch_goes_on_to_the_same_bytes(uninterrupted: Path, before_end: int) -> None:
    name = f"killed-{before_end}"
    step = (last_epoch(uninterrupted) - before_end) * STEPS
    with pytest.raises(Interrupt):
        resumable(uninterrupted, name, interrupted_after(step + 1))
    assert not (uninterrupted / name).exists()
    said: list[str] = []
    resumable(uninterrupted, name, silent, said.append)
    assert any(f"checkpoint-{step} " in sentence for sentence in said)
    assert contents(uninterrupted / name) == contents(uninterrupted / "tuned")
    assert checkpoints(uninterrupted, name) == []


def test_a_run_killed_after_early_stopping_has_the_same_bytes(uninterrupted: Path) -> None:
    with pytest.raises(Interrupt):
        resumable(uninterrupted, "killed-at-end", interrupted_after(None))
    resumable(uninterrupted, "killed-at-end", silent)
    assert contents(uninterrupted / "killed-at-end") == contents(uninterrupted / "tuned")


@pytest.fixture(scope="module")
def last(uninterrupted: Path) -> Path:
    """The last of two checkpoints of a killed run."""
    with pytest.raises(Interrupt):
        resumable(uninterrupted, "damaged", interrupted_after(2 * STEPS + 1))
    return checkpoints(uninterrupted, "damaged")[-1]


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("damage", ["cut short", "gone"])
def test_a_last_checkpoint_that_is_not_whole_is_passed_over(
    uninterrupted: Path, last: Path, file: str, damage: str
) -> None:
    content = (last / file).read_bytes()
    (last / file).unlink()
    if damage == "cut short":
        (last / file).write_bytes(content[: len(content) // 2])
    said: list[str] = []
    with pytest.raises(Interrupt):
        resumable(uninterrupted, "damaged", interrupted_after(0), said.append)
    (last / file).write_bytes(content)
    assert any(f"checkpoint-{STEPS} " in sentence for sentence in said)


def test_a_run_whose_last_checkpoint_is_not_whole_goes_on_to_the_same_bytes(uninterrupted: Path) -> None:
    with pytest.raises(Interrupt):
        resumable(uninterrupted, "not-whole", interrupted_after(2 * STEPS + 1))
    file = checkpoints(uninterrupted, "not-whole")[-1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    resumable(uninterrupted, "not-whole", silent)
    assert contents(uninterrupted / "not-whole") == contents(uninterrupted / "tuned")


def test_a_run_killed_just_behind_its_last_step_is_found_done(uninterrupted: Path) -> None:
    before = contents(uninterrupted / "tuned")
    request = json.loads(before["pimerge.json"])["request"]
    left = uninterrupted / f".tuned.training-{request[:12]}" / "checkpoint-1"
    left.mkdir(parents=True)
    with pytest.raises(AlreadyDone, match="tuned' is there already"):
        resumable(uninterrupted, "tuned", silent)
    assert contents(uninterrupted / "tuned") == before
    assert not left.parent.exists()


def test_other_options_do_not_resume(uninterrupted: Path) -> None:
    with pytest.raises(Interrupt):
        resumable(uninterrupted, "other", interrupted_after(2 * STEPS + 1))
    said: list[str] = []
    x, a = (open_expert(uninterrupted / name) for name in ("x", "a"))
    options = replace(LONG, lr=1e-3, epochs=1)
    output = uninterrupted / "other"
    tune("interpolated", open_task(x.path), x.base, [a], x, output, options, scores=[0.3], note=said.append)
    assert not any("resuming" in sentence for sentence in said)


def test_another_targets_expert_does_not_resume(
    uninterrupted: Path, make_expert: MakeExpert, bert_base: Path, text_task: Path
) -> None:
    said: list[str] = []
    for rank, track in ((2, interrupted_after(STEPS + 1)), (3, silent)):
        target = open_expert(make_expert(uninterrupted / "like", bert_base, text_task, r=rank))
        with pytest.raises(Interrupt) if track is not silent else nullcontext():
            tune(
                "scratch",
                open_task(target.path),
                target.base,
                [],
                target,
                uninterrupted / "fresh",
                replace(LONG, epochs=2),
                track=track,
                note=said.append,
            )
    assert not any("resuming" in sentence for sentence in said)
    assert open_expert(uninterrupted / "fresh").ranks == (3,)


MANNERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "averaged, sharpness-aware, towards the start": (
        "interpolated",
        {"ema": 0.6, "sam": 0.05, "decay_towards": "start", "weight_decay": 0.3},
        {},
    ),
    "chosen on folds": ("learned", {}, {"select": "cv"}),
    "soup": ("soup", {"epochs": 6}, {}),
    "soup of all": ("soup", {"epochs": 6, "holdout": 0.0, "ema": 0.5}, {}),
    "distill": ("distill", {"epochs": 8}, {}),
    "ensemble": ("ensemble", {"epochs": 4}, {}),
    "full": ("full", {"lr": 1e-3}, {}),
    "gradient-free": ("gradient-free", {"epochs": 4}, {"settings": {"evaluations": 2}}),
}


def killed_in_training(number: int, steps: int) -> Track:
    """A kill after so many steps of one of the trainings, from 0; shows of something else do not count."""
    begun = -1

    @contextmanager
    def track(description: str, total: int, unit: str) -> Iterator[Advance]:
        nonlocal begun
        begun += unit == "steps"
        done, mine = 0, begun == number

        def advance(step: int = 1, note: str = "") -> None:
            nonlocal done
            done += step
            if mine and unit == "steps" and done >= steps:
                raise Interrupt

        yield advance

    return track


@pytest.mark.parametrize("manner", MANNERS)
def test_whatever_is_tuned_goes_on_to_the_same_bytes(uninterrupted: Path, manner: str) -> None:
    """Killed within the second training, where there are several."""
    method, changes, more = MANNERS[manner]
    options = replace(LONG, **{"epochs": 3, "lr": 0.02, **changes})
    x, a = (open_expert(uninterrupted / name) for name in ("x", "a"))

    def run(name: str, track: Track, said: list[str]) -> None:
        output = uninterrupted / name
        tune(method, open_task(x.path), x.base, [a], x, output, options, track=track, note=said.append, **more)

    one = method in ("interpolated", "full")
    said: list[str] = []
    with pytest.raises(Interrupt):
        run(f"{manner} killed", killed_in_training(0 if one else 1, STEPS + 2), [])
    run(f"{manner} killed", silent, said)
    run(f"{manner} whole", silent, [])
    if more.get("select") != "cv":  # of the folds nothing is said
        assert sum("resuming" in sentence for sentence in said) == (1 if one else 2)
    found, expected = (
        {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
        for folder in (uninterrupted / f"{manner} killed", uninterrupted / f"{manner} whole")
    )
    assert found == expected
