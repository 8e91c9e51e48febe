"""``pimerge eval``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pimerge.adapters.selected import base_of, open_all, select
from pimerge.cli import options
from pimerge.cli.console import note, print_json, print_table, tracker
from pimerge.cli.merge.request import is_checkpoint
from pimerge.core.errors import PimergeError
from pimerge.core.libraries import quiet_libraries
from pimerge.tasks.metric import METRICS

if TYPE_CHECKING:
    from pimerge.adapters.expert import Expert
    from pimerge.tuning.ensemble import Ensemble

DEFAULT_OUTPUTS = ("tuned", "merged")


def evaluate(
    experts: Annotated[
        list[str] | None, typer.Argument(help="Experts to score. Default: tuned and merged, if they are there.")
    ] = None,
    target: options.TargetReference = None,
    ranking: options.RankingPath = Path("ranking.json"),
    base: options.BaseReference = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result as JSON, too.")] = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Score experts and the bare base on the target's test split, each with a 95 % interval.

    What 'tune --method ensemble' and '--method full' wrote is scored, too.
    """
    from pimerge.core.files import json_text, require_absent, write_file
    from pimerge.evaluation.evaluate import evaluate as score
    from pimerge.evaluation.evaluate import evaluate_checkpoint
    from pimerge.tasks.task import open_task
    from pimerge.tuning.ensemble import is_ensemble, open_ensemble

    references = experts or [name for name in DEFAULT_OUTPUTS if Path(name).is_dir()]
    if output is not None:
        require_absent(output, force)
    checkpoints = [reference for reference in references if is_checkpoint(reference)]
    ensembles = {reference: open_ensemble(Path(reference), base) for reference in references if is_ensemble(reference)}
    single = [reference for reference in references if reference not in {*checkpoints, *ensembles}]
    singles = dict(zip(single, open_all(single, base), strict=True))
    opened = [*singles.values(), *(expert for ensemble in ensembles.values() for expert in ensemble.experts)]
    chosen = select(None, ranking, target, base, needed=False)
    folder = chosen.task_folder or next(
        (path for path in [*(e.path for e in opened), *map(Path, checkpoints)] if (path / "task.json").is_file()), None
    )
    if folder is None:
        raise PimergeError(
            "the target is not known" if references else "there is nothing to score",
            "pass --target FOLDER (an expert's or a task's)" if references else "name experts, or run 'pimerge tune'",
        )
    quiet_libraries()
    task = open_task(folder)
    how: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "track": tracker(quiet),
        "note": lambda message: note(message, quiet),
    }
    scores = []
    if opened or chosen.target or base:
        asked: dict[str, Expert | Ensemble] = {**singles, **ensembles}
        rows = [asked[reference] for reference in references if reference not in checkpoints]
        scores = score(rows, task, base_of(opened, chosen.target, base), chosen.target, **how)
    scores += [evaluate_checkpoint(Path(path), task, **how) for path in checkpoints]
    document = {"target": task.name, "split": "test", "scores": [asdict(row) for row in scores]}
    if output is not None:
        write_file(output, json_text(document))
    if json:
        print_json(document)
        return
    shown = [(name, METRICS.load(name).format) for name in task.metrics]
    print_table(
        [
            "expert",
            *(title for name, _ in shown for title in (name, "95 %")),
            "loss",
            "95 %",
            "n",
            "",
        ],
        [
            [
                row.name,
                *(text for name, style in shown for text in _cells(asdict(row.metrics[name]), style)),
                f"{row.loss:.3f}",
                f"{row.loss_low:.3f} – {row.loss_high:.3f}",
                str(row.examples),
                row.note,
            ]
            for row in scores
        ],
        right=[*task.metrics, "loss", "n"],
    )
    note(f"on the test split of {task.name}", quiet)


def _cells(found: dict[str, float], style: str) -> list[str]:
    """A value and its interval."""
    return [format(found["value"], style), f"{found['low']:{style}} – {found['high']:{style}}"]
