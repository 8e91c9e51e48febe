"""Compare methods on the target X at one budget: mean ± sd of the test accuracy over seeds.

    python examples/digits/compare.py [--seeds 3]

Run after ``pimerge embed`` and ``pimerge rank``, in this folder. Each seed draws another five scans of each digit
to train on (from the split ``draws``, which nothing else uses), another init and another order. Every method has
30 passes over them in all; π-Tuning spends half of them on the target's own expert. Each learning
rate is the best of 0.001, 0.003, 0.01 and 0.02 on another target, all ten digits rotated: nothing was tuned on X.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from pimerge.cli.console import print_table, quiet_libraries
from pimerge.evaluation import BASE, evaluate
from pimerge.expert import Expert, open_expert
from pimerge.ranking import open_ranked, read_ranking
from pimerge.task import Task, open_task
from pimerge.training import Options
from pimerge.tuning import tune

RANKING = Path("ranking.json")
SHOTS, EPOCHS = 5, 30
# label, tune method, how many of the ranking's first, learning rate
METHODS = {
    "head only": ("head", 0, 2e-2),
    "fresh LoRA": ("scratch", 0, 1e-2),
    "best single expert": ("uniform", 1, 3e-3),
    "uniform": ("uniform", 2, 1e-2),
    "learned": ("learned", 2, 3e-3),
    "interpolated (π-Tuning)": ("interpolated", 2, 3e-3),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    jobs = [(label, seed) for seed in range(seeds) for label in METHODS]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=prepare) as workers:
        accuracies = dict(zip(jobs, workers.map(accuracy, *zip(*jobs, strict=True)), strict=True))
    rows = []
    for label, (_, count, _) in METHODS.items():
        values = [100 * accuracies[label, seed] for seed in range(seeds)]
        spread = statistics.stdev(values) if seeds > 1 else 0.0
        rows.append([label, str(count) if count else "–", f"{statistics.mean(values):.1f} ± {spread:.1f}"])
    print_table(["method", "experts", f"test accuracy, %, {seeds} seeds"], rows)


def prepare() -> None:
    """Set up a worker: one thread each, since the model is too small to gain from more."""
    import torch

    quiet_libraries()
    torch.set_num_threads(1)


def accuracy(label: str, seed: int) -> float:
    """Test accuracy of one method on one draw."""
    method, count, lr = METHODS[label]
    ranking = read_ranking(RANKING)
    experts = [open_ranked(candidate, RANKING) for candidate in ranking.candidates[:count]]
    scores = [candidate.score for candidate in ranking.candidates[:count]]
    target = open_ranked(ranking.target, RANKING)
    drawn = open_task(target.path)
    task = dataclasses.replace(drawn, file=drawn.file.model_copy(update={"splits": {"train": "draws"}}))
    options = Options(epochs=EPOCHS, lr=lr, holdout=0.0, shots=SHOTS, seed=seed, init_seed=seed, **like(target))
    with tempfile.TemporaryDirectory() as folder:
        own = None
        if method == "interpolated":
            options = dataclasses.replace(options, epochs=EPOCHS / 2)
            own = run("scratch", task, target, [], None, [], Path(folder) / "own", options)
        tuned = run(method, task, target, experts, own, scores, Path(folder) / "tuned", options)
        rows = evaluate([tuned], task, target.base, None, device="cpu")
    return next(row.accuracy for row in rows if row.name != BASE)


def run(
    method: str,
    task: Task,
    target: Expert,
    experts: list[Expert],
    own: Expert | None,
    scores: list[float],
    output: Path,
    options: Options,
) -> Expert:
    """Tune and open the result; its base is the target's, wherever the output lies."""
    tune(method, task, target.base, experts, own, output, options, scores=scores, device="cpu")
    return open_expert(output)


def like(expert: Expert) -> dict[str, object]:
    """Options that make a fresh LoRA of the same form as an expert."""
    module = next(iter(expert.modules.values()))
    return {"fresh_rank": module.rank, "fresh_alpha": module.alpha, "fresh_modules": tuple(sorted(expert.modules))}


if __name__ == "__main__":
    main()
