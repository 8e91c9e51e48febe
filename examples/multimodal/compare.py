"""Compare methods at equal budget on a few-shot target of each modality: mean ± sd of the test accuracy over seeds.

    python examples/multimodal/compare.py RANKING... [--seeds 3]

Each ranking is one by a target's few examples, as ``pimerge rank --target tasks/NAME`` writes it, in the folder that
holds ``experts`` and ``tasks``. The experts are LoRA. Each seed samples other training examples, another init and
another order. Every method has the same total number of passes over them; π-Tuning spends half of them on the
target's own expert. Nothing was tuned on the targets: the learning rate is that of the pool.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from matrix import LORA, kind_of, modality

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.ranking_document import Candidate, open_ranked, read_ranking
from pimerge.cli.console import print_table
from pimerge.evaluation.scoring import BASE, score_experts
from pimerge.models.loading import quiet_libraries
from pimerge.tasks.task import open_task
from pimerge.tuning.method import open_tune_method
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.run import TuneInputs, run_tuning

EPOCHS = 30
LR = 1e-2  # make.py's
FORM: dict[str, Any] = {"fresh_rank": 4, "fresh_alpha": 8.0, "fresh_modules": ("q_proj", "v_proj", "qkv")}
COMPANIONS = 2
METHODS = [
    "bare base",
    "fresh LoRA",
    "best single expert, not trained",
    "best single expert, trained further",
    "π-Tuning: own + 2 of its modality",
    "π-Tuning: own + 2 of other modalities",
    "π-Tuning: own + the 2 best of all",
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("rankings", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    jobs = list(product(arguments.rankings, range(arguments.seeds)))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=prepare) as workers:
        found = dict(
            zip(jobs, workers.map(partial(accuracies, arguments.epochs), *zip(*jobs, strict=True)), strict=True)
        )
    rows = [
        [
            method,
            *(spread([found[ranking, seed][i] for seed in range(arguments.seeds)]) for ranking in arguments.rankings),
        ]
        for i, method in enumerate(METHODS)
    ]
    print_table(["method", *(read_ranking(path).target.name for path in arguments.rankings)], rows)
    for path in arguments.rankings:
        same, other, every = (", ".join(one.name for one in group) for group in companions(path))
        print(f"{read_ranking(path).target.name}: from its modality {same}; from others {other}; from all {every}")


def prepare() -> None:
    """Set up a worker: one thread each, since the model is too small to gain from more."""
    import torch

    quiet_libraries()
    torch.set_num_threads(1)


def spread(values: list[float]) -> str:
    """Mean ± sd, in per cent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


def companions(path: Path) -> tuple[list[Candidate], list[Candidate], list[Candidate]]:
    """The first LoRA experts of a ranking: from the target's modality, from the others, from all."""
    ranking = read_ranking(path)
    pool = [one for one in ranking.candidates if kind_of(one.name) == LORA]
    same = [one for one in pool if modality(one.name) == modality(ranking.target.name)]
    other = [one for one in pool if one not in same]
    return same[:COMPANIONS], other[:COMPANIONS], pool[:COMPANIONS]


def accuracies(epochs: int, path: Path, seed: int) -> list[float]:
    """Test accuracy of every method on one sampling of a target's examples."""
    ranking = read_ranking(path)
    task = open_task(path.parent / ranking.target.path)
    groups = companions(path)
    best = open_ranked(groups[-1][0], path)
    options = TrainingOptions(
        epochs=epochs,
        lr=LR,
        holdout=0.0,
        label_smoothing=0.0,
        shots=ranking.seen.shots if ranking.seen else None,
        seed=seed,
        init_seed=seed,
        **FORM,
    )
    half = replace(options, epochs=epochs / 2)
    with tempfile.TemporaryDirectory() as folder:

        def tuned(
            name: str, method: str, experts: list[Expert], own: Expert | None, options: TrainingOptions
        ) -> Expert:
            # not by pimerge.tune, which takes the task of the target's own expert: here that is an expert of another
            inputs = TuneInputs(
                method=open_tune_method(method),
                task=task,
                base=best.base,
                experts=experts,
                target=own,
                options=options,
                device="cpu",
            )
            run_tuning(inputs, Path(folder) / name)
            return open_expert(Path(folder) / name, best.base.reference)

        own = tuned("own", "scratch", [], None, half)
        rows = score_experts(
            [
                tuned("fresh", "scratch", [], None, options),
                tuned("as-it-is", "uniform", [best], None, options),
                tuned("trained-on", "interpolated", [best], best, options),
                *(
                    tuned(f"pi-{number}", "interpolated", [open_ranked(one, path) for one in group], own, half)
                    for number, group in enumerate(groups)
                ),
            ],
            task,
            best.base,
            None,
            device="cpu",
        )
    assert rows[0].name == BASE
    return [row.accuracy for row in rows]


if __name__ == "__main__":
    main()
