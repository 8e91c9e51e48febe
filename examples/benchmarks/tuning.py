"""Which tune method is best with few labels, over the targets of a pool: how the default of ``tune`` was chosen.

    python examples/benchmarks/tuning.py EXPERTS WORK [--targets a,b] [--shots 5,20] [--methods guided,learned]

EXPERTS is a folder of experts with a ``task.json`` each. Each target in turn is treated as a new task: ``pimerge
compare`` runs methods and controls on samplings of its examples, with all other experts as the pool, ranked on each
sampling. Runs are kept in WORK, and a second call only runs what is new. For each number of shots it prints the mean
over targets, the paired difference to the best control (the one with the highest mean over the targets) ± its
standard error over targets, the lowest difference of a target to its own best control, and the closed share of the
distance between a fresh LoRA and the target's own expert, which was trained on all of its data.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from pimerge.adapters.expert import open_expert
from pimerge.adapters.pool import find_experts
from pimerge.cli.console import print_line, print_table
from pimerge.evaluation.design import ComparisonDesign, RankedExpert, all_controls, shots_text
from pimerge.evaluation.runner import ComparisonRequest, run_comparison
from pimerge.evaluation.scoring import BASE, score_experts
from pimerge.models.loading import quiet_libraries
from pimerge.tasks.task import open_task
from pimerge.tuning.options import TrainingOptions

FRESH = "scratch"


def main() -> None:
    """Run what is new, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("experts", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--targets", help="separated by commas; default: all")
    parser.add_argument("--shots", default="5,20")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="guided,learned,interpolated,ensemble")
    parser.add_argument("--controls", default="head,scratch,full,single,uniform")
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--select", default="fixed")
    parser.add_argument("--lr", action="append", default=[], help="METHOD=NUMBER")
    given = parser.parse_args()
    quiet_libraries()
    design = ComparisonDesign(
        methods=[*given.controls.split(","), *given.methods.split(",")],
        shots=[None if text == "all" else int(text) for text in given.shots.split(",")],
        seeds=given.seeds,
        experts=[given.k],
        options=TrainingOptions(epochs=given.epochs, holdout=0.0),
        select=given.select,
        lrs={name: float(value) for name, _, value in (text.partition("=") for text in given.lr)},
    )
    names = given.targets.split(",") if given.targets else [path.name for path in find_experts(given.experts)]
    scores: dict[tuple[int | None, str, str], float] = {}
    own: dict[str, float] = {}
    for name in names:
        print_line(f"target {name}")
        for (shots, method), score in run(given.experts, name, given.work / name, design).items():
            scores[shots, method, name] = score
        own[name] = accuracy_of_own(given.experts / name)
    for shots in design.shots:
        table(shots, design.methods, names, scores, own)


def run(experts: Path, name: str, work: Path, design: ComparisonDesign) -> dict[tuple[int | None, str], float]:
    """(Shots, method) → mean accuracy over the seeds, for one target."""
    target = open_expert(experts / name)
    pool = [RankedExpert(open_expert(path)) for path in find_experts(experts) if path.name != name]
    document = run_comparison(
        ComparisonRequest(task=open_task(target.path), base=target.base, pool=pool, design=design, folder=work)
    )
    assert document is not None
    return {(line.shots, line.method): line.mean for line in document.lines}


def accuracy_of_own(path: Path) -> float:
    """Accuracy of the target's own expert, trained on all of its data."""
    expert = open_expert(path)
    rows = score_experts([expert], open_task(path), expert.base, None)
    return next(row.accuracy for row in rows if row.name != BASE)


def table(
    shots: int | None,
    methods: Sequence[str],
    names: Sequence[str],
    scores: dict[tuple[int | None, str, str], float],
    own: dict[str, float],
) -> None:
    """Print the table of one number of shots."""
    points = {method: [100 * scores[shots, method, name] for name in names] for method in methods}
    controls = [method for method in methods if method in all_controls()]
    best = max(controls, key=lambda method: statistics.fmean(points[method]))
    best_each = [max(points[control][i] for control in controls) for i in range(len(names))]
    above = statistics.fmean(100 * own[name] for name in names)
    rows = []
    for method in methods:
        differences = [one - other for one, other in zip(points[method], points[best], strict=True)]
        error = statistics.stdev(differences) / len(names) ** 0.5 if len(names) > 1 else 0.0
        lowest = min(zip((p - b for p, b in zip(points[method], best_each, strict=True)), names, strict=True))
        mean = statistics.fmean(points[method])
        closed = ""
        if FRESH in points and (distance := above - statistics.fmean(points[FRESH])) > 0:
            closed = f"{(mean - statistics.fmean(points[FRESH])) / distance:.0%}"
        difference = "" if method == best else f"{statistics.fmean(differences):+.1f} ± {error:.1f}"
        control = " (control)" if method in controls else ""
        rows.append([method + control, f"{mean:.1f}", difference, f"{lowest[0]:+.1f} ({lowest[1]})", closed])
    print_line(f"\n{shots_text(shots)}, {len(names)} targets; their own experts have {above:.1f}")
    print_table(["method", "accuracy, %", f"to {best}", "lowest, to the best control", "distance closed"], rows)


if __name__ == "__main__":
    main()
