"""The papers' studies: two run completely on part of their data; for the others, their calls and tables are checked.

Their calls go through the commands ``pimerge compare`` and ``pimerge tune``, whose training is replaced by a fake.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from scipy.stats import ttest_rel

from pimerge.adapters.expert import Expert
from pimerge.evaluation.design import ComparisonDesign
from pimerge.evaluation.runner import ComparisonRequest
from pimerge.evaluation.schema import ComparisonDocument, ComparisonRun
from pimerge.tasks.task import Task
from pimerge.tuning.run import TuneInputs
from tests.support.tasks import write_json
from tests.support.warm import answer, run_script

EXAMPLES = Path(__file__).parents[2] / "examples"
STUDIES, DIGITS = EXAMPLES / "studies", EXAMPLES / "digits"
LITTLE = {"SHOTS": "1", "EPOCHS": "1", "BATCH": "64", "RECIPE": "--modules q_proj --fresh-rank 1 --shots 2 --epochs 1"}
Study = Callable[..., tuple[str, list[list[str]]]]
Compared = list[tuple[Task, list[Expert], ComparisonDesign, list[str]]]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Run a study with these variables; return its output and the rows of its table."""

    def run(name: str, **variables: str) -> tuple[str, list[list[str]]]:
        with tempfile.TemporaryDirectory(prefix="s") as folder:  # short, for the socket
            code, printed = run_script(STUDIES / name / "run.sh", [str(tmp_path / "work")], Path(folder), **variables)
        assert code == 0, printed
        table = (tmp_path / "work" / "table.md").read_text()
        assert table in printed
        rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
        return printed, [rows[0], *rows[2:]]

    return run


def _lasting(thing: Any) -> Any:
    """The same with absolute paths, since the script works in another folder."""
    return replace(thing, path=thing.path.resolve())


def score(method: str, shots: int | None, seed: int, k: int, test: str) -> float:
    """A fake score that depends on all arguments."""
    return (10 * len(method) + (shots or 30) + 3 * seed**2 * k + len(test)) / 200


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Compared:
    """The requested comparisons, in order; the scores are fake."""
    found: Compared = []

    def compare(request: ComparisonRequest, **more: Any) -> ComparisonDocument:
        task, design = request.task, request.design
        tests = ["test", *(each.name for each in request.also)]
        found.append((_lasting(task), [_lasting(each.expert) for each in request.pool], design, tests))
        runs = [
            ComparisonRun(
                method=method,
                shots=shots,
                seed=seed,
                k=k,
                experts=[],
                scores={test: score(method, shots, seed, k, test) for test in tests},
                losses=dict.fromkeys(tests, 0.0),
                trained_parameters=0,
                deployed_parameters=0,
                epochs=1,
                seconds=0,
            )
            for method in design.methods
            for shots in design.shots
            for seed in range(design.seeds)
            for k in ([0] if method in ("head", "scratch", "full") else design.experts)
        ]
        return ComparisonDocument(
            target=task.name, base="", metric="accuracy", options={}, experts=[], runs=runs, lines=[], conclusion=""
        )

    monkeypatch.setattr("pimerge.evaluation.compare.run_comparison", compare)
    return found


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Task, int | None, int | None]]:
    """Output, task, shots and rank of the requested experts, which are copies of a committed one."""
    found = []

    def run_tuning(inputs: TuneInputs, output: Path, **_: object) -> Any:
        assert inputs.method.name == "scratch"
        found.append((output.resolve(), _lasting(inputs.task), inputs.options.shots, inputs.options.fresh_rank))
        shutil.copytree(DIGITS / "experts" / "noisy", output)
        write_json(output / "task.json", inputs.task.document_for(output))
        raise SystemExit(0)  # nothing to print

    monkeypatch.setattr("pimerge.tuning.tune.run_tuning", run_tuning)
    return found


@pytest.mark.parametrize(
    ("name", "methods", "shots", "counts"),
    [
        ("ablations", ["scratch", "random", "uniform", "interpolated", "learned"], [5], [2]),
        ("auxiliaries", ["scratch", "interpolated"], [5], [1, 2, 3, 4]),
        ("upstream", ["scratch", "uniform", "learned"], [5], [1, 2, 4, 8]),
        ("label-shift", ["head", "scratch", "uniform", "learned"], [1, 5], [3]),
        ("covariate-shift", ["head", "scratch", "uniform", "learned"], [1, 5], [3]),
        ("task-shift", ["head", "scratch", "uniform", "learned"], [1, 5], [3]),
        ("distribution-shift", ["head", "scratch", "full", "uniform", "learned"], [20], [3]),
    ],
)
def test_a_study_compares_on_the_digits(
    study: Study,
    compared: Compared,
    trained: list[object],
    name: str,
    methods: list[str],
    shots: list[int | None],
    counts: list[int],
) -> None:
    _, (titles, *rows) = study(name)
    [(task, pool, design, tests)] = compared
    assert (design.methods, design.shots, design.seeds, design.experts) == (methods, shots, 3, counts)
    assert max(counts) <= len(pool)
    assert set(design.lrs) == set(methods)
    used = {number for expert in pool for number in numbers_of(expert)}
    assert not used & {*numbers(task, design.split or "train"), *numbers(task, "test")}
    assert len(titles) == 1 + len(shots) * len(tests)
    for row in rows:
        method, _, count = row[0].partition(", ")
        k = 0 if method in ("head", "scratch", "full") else int(count.split()[0]) if count else 1
        places = [(each, test) for each in shots for test in tests]
        for text, (each, test) in zip(row[1:], places, strict=True):
            values = [100 * score(method, each, seed, k, test) for seed in range(3)]
            rival = [100 * score("scratch", each, seed, 0, test) for seed in range(3)]
            assert text == expected(values, None if method == "scratch" else rival)


def expected(values: Sequence[float], rival: Sequence[float] | None) -> str:
    """The expected text of a cell, by SciPy."""
    text = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    if rival is None:
        return text
    difference = statistics.mean(values) - statistics.mean(rival)
    if statistics.stdev(values) == 0:  # the rival's difference is always 0, and SciPy gives no interval for this
        return f"{text} ({difference:+.1f} [{difference:+.1f}, {difference:+.1f}])"
    interval = ttest_rel(values, rival).confidence_interval()
    return f"{text} ({difference:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}])"


def numbers(task: Task, split: str) -> set[int]:
    """The numbers of the scans in a split."""
    return set(pq.read_table(task.path.parent / task.file.data[split])["number"].to_pylist())


def numbers_of(expert: Expert) -> set[int]:
    """The numbers of the scans that an expert was trained on."""
    document = json.loads((expert.path / "task.json").read_text())
    return set(pq.read_table(expert.path / document["data"]["train"])["number"].to_pylist())


@pytest.mark.parametrize(
    ("name", "variants", "shots", "ranks"),
    [
        ("split-size", ["upstream 6", "upstream 20", "upstream all"], [6, 20, None], [4, 4, 4]),
        ("rank", ["rank 1", "rank 2", "rank 4", "rank 8"], [None] * 4, [1, 2, 4, 8]),
    ],
)
def test_a_study_trains_its_experts(
    study: Study,
    compared: Compared,
    trained: list[Any],
    name: str,
    variants: list[str],
    shots: list[int | None],
    ranks: list[int],
) -> None:
    _, (titles, *rows) = study(name, SEEDS="2")
    assert titles == ["method", *variants]
    assert [(task.name, few, rank) for _, task, few, rank in trained] == [
        (task, few, rank) for few, rank in zip(shots, ranks, strict=True) for task in ("inverted-0-6", "inverted-3-9")
    ]
    pools = [{expert.path for expert in pool} for _, pool, _, _ in compared]
    outputs = [output for output, *_ in trained]
    assert pools == [set(outputs[place : place + 2]) for place in range(0, len(outputs), 2)]
    assert [row[0] for row in rows] == ["scratch", "uniform, 2 experts", "learned, 2 experts"]
    assert all("(" in cell for row in rows[1:] for cell in row[1:])  # each is compared with a fresh LoRA


def test_multi_task(study: Study, compared: Compared, trained: list[Any]) -> None:
    _, (titles, *rows) = study("multi-task", SEEDS="2")
    assert titles == ["method", "an expert each", "one on the union"]
    [(_, union, _, _)] = trained
    apart, together = (pool for _, pool, _, _ in compared)
    assert numbers(union, "train") == {number for expert in apart for number in numbers_of(expert)}
    assert len(together) == 1
    assert {row[0] for row in rows if row[2] != "–"} == {"single"}


def test_a_study_takes_any_pool(study: Study, compared: Compared) -> None:
    pool = f"{DIGITS}/experts/noisy {DIGITS}/experts/parity"
    study("task-shift", POOL=pool, TARGET=f"{DIGITS}/experts/X", EXPERTS="1,2", SHOTS="3", RATES="")
    [(task, experts, design, _)] = compared
    assert task.name == "X"
    assert [expert.name for expert in experts] == ["noisy", "parity"]
    assert (design.shots, design.experts, design.lrs) == ([3], [1, 2], {})


def test_a_pool_without_a_target_is_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "POOL": str(DIGITS / "experts")}
    command = ["bash", str(STUDIES / "task-shift" / "run.sh"), str(tmp_path / "work")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode != 0
    assert "TARGET is not set" in result.stderr
    assert not (tmp_path / "work").exists()


def test_entangled_runs(study: Study, tmp_path: Path) -> None:
    pool = f"{DIGITS}/experts/digits-0-4 {DIGITS}/experts/inverted-3-9"
    target = f"{DIGITS}/tasks/digits-0-4 {DIGITS}/tasks/inverted-0-6"
    printed, (titles, *rows) = study("entangled", **{**LITTLE, "EPOCHS": "3"}, POOL=pool, TARGET=target, SEEDS="2")
    assert titles == ["target", "digits-0-4", "inverted-3-9"]
    assert [row[0] for row in rows] == ["digits-0-4", "inverted-0-6"]
    shares = [[cell.partition("(")[2] for cell in row[1:]] for row in rows]
    assert shares == [["100 %)", "40 %)"], ["71 %)", "57 %)"]]
    for row in rows:
        for place, cell in enumerate(row[1:]):
            files = (tmp_path / "work" / "tuned").glob(f"{row[0]}-*/coefficients.json")
            weights = [json.loads(file.read_text())["weights"].values() for file in files]
            assert len(weights) == 2
            mean = statistics.mean(statistics.mean(column[place] for column in columns) for columns in weights)
            assert cell.startswith(f"{mean:.2f}")
    assert "of 4 runs" in printed


def test_zero_shot_runs(study: Study, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    assert answer(str(tmp_path), [str(DIGITS / "cut.py"), "tasks", "a:plain:0-1:few", "b:noisy:0-1:few"])[0] == 0
    pool = f"{tasks}/a {tasks}/b"
    _, (_, *rows) = study("zero-shot", **LITTLE, POOL=pool, TARGET=f"{tasks}/a", BASE=f"{DIGITS}/base")
    assert [row[0] for row in rows] == ["a", "b"]
    for row, other in zip(rows, "ba", strict=True):
        scores = json.loads((tmp_path / "work" / f"{row[0]}.scores.json").read_text())["scores"]
        values = {each["name"]: f"{100 * each['accuracy']:.1f}" for each in scores}
        assert row[1].startswith(values[row[0]])
        assert row[2] == row[3] == row[5]
        assert row[2].startswith(f"{other} {values[other]}")
        assert row[6].startswith(values["bare"])


def test_cut_writes_what_is_committed(tmp_path: Path) -> None:
    arguments = ["tasks", "noisy-parity:noisy:parity:train", "inverted-3-9:inverted:3-9:train"]
    assert answer(str(tmp_path), [str(DIGITS / "cut.py"), *arguments])[0] == 0
    for task in ("noisy-parity", "inverted-3-9"):
        for name in ("train", "test"):
            made, committed = (folder / "tasks" / task / f"{name}.parquet" for folder in (tmp_path, DIGITS))
            assert pq.read_table(made).equals(pq.read_table(committed))
        assert (tmp_path / "tasks" / task / "task.json").read_bytes() == (
            DIGITS / "tasks" / task / "task.json"
        ).read_bytes()


def test_cut_combines_looks_and_parts(tmp_path: Path) -> None:
    assert answer(str(tmp_path), [str(DIGITS / "cut.py"), ".", "both:inverted+rotated:loop:few+draws"])[0] == 0
    table = pq.read_table(tmp_path / "both" / "train.parquet")
    assert len(table) == 2 * 10 * 20
    assert len(set(table["number"].to_pylist())) == 200


def test_cut_reports_everything_that_it_does_not_understand(tmp_path: Path) -> None:
    code, _, err = answer(str(tmp_path), [str(DIGITS / "cut.py"), "tasks", "a:blurred:0-4:few", "b:plain:parity:rest"])
    assert code == 1
    assert "a:blurred:0-4:few, b:plain:parity:rest: expected NAME:LOOK:QUESTION:PARTS" in err
    assert not (tmp_path / "tasks").exists()
