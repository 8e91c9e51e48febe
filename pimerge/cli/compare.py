"""``pimerge compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_json, print_line, print_table, tracker
from pimerge.core.errors import PimergeError
from pimerge.core.libraries import quiet_libraries
from pimerge.tasks.metric import METRICS

if TYPE_CHECKING:
    from pimerge.adapters.expert import Expert
    from pimerge.evaluation.design import RankedExpert
    from pimerge.evaluation.schema import ComparisonDocument, ComparisonLine

COLUMNS = ("method", "experts", "score", "to the best control", "95 %", "trained", "deployed", "seconds")


def compare(
    experts: Annotated[
        list[str] | None,
        typer.Argument(help="The pool: experts, or folders of them. Default: the candidates of the ranking."),
    ] = None,
    target: options.TargetReference = None,
    shots: Annotated[str, typer.Option(help="Training examples of each class, such as 1,5,20,all.")] = "5",
    seeds: Annotated[int, typer.Option(help="Draws of the examples: seeds 0, 1, ….")] = 3,
    methods: Annotated[
        str, typer.Option(help="Tune methods, with commas ('pimerge tune --methods' lists them).")
    ] = "guided,learned,interpolated",
    controls: Annotated[
        str | None,
        typer.Option(
            help="Controls, with commas: head, scratch, named, full, single, uniform, random; or none. Default: all "
            "but random, and named where a method takes the names of classes as examples."
        ),
    ] = None,
    counts: Annotated[
        str, typer.Option("--experts", help="How many of the ranked experts are at hand, such as 1,2,4.")
    ] = "2",
    also_test: Annotated[
        list[str] | None, typer.Option(help="Score on the test split of this task, too; once for each.")
    ] = None,
    draw_from: Annotated[
        str | None, typer.Option(help="Split of the data that the shots are drawn from. Default: the train split.")
    ] = None,
    rank_by: Annotated[
        str, typer.Option(help="draws: rank the pool on the examples of each draw; ranking: take the ranking's order.")
    ] = "draws",
    select: Annotated[
        str, typer.Option(help="fixed: learning rates as given; cv: each method's chosen on folds of the examples.")
    ] = "fixed",
    epochs: Annotated[float, typer.Option(help="Passes over the training examples, the same for all.")] = 30,
    lr: Annotated[
        list[str] | None, typer.Option(help="METHOD=NUMBER: its learning rate. Default: as 'pimerge tune' has it.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 16,
    class_names: options.ClassNames = None,
    holdout: Annotated[float, typer.Option(help="Share of the examples kept for early stopping.")] = 0.0,
    ranking: options.RankingPath = Path("ranking.json"),
    base: options.BaseReference = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The document; a .md and a .csv of that name go beside it.")
    ] = Path("comparison.json"),
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run tune methods and controls on draws of the target's examples, at equal budget, and say which is best.

    Every run is kept beside the output: a comparison that was interrupted goes on, and one with more methods, shots or
    seeds runs what is new alone. Under 'accelerate launch' every process takes its share of the runs.
    """
    quiet_libraries()
    from pimerge.adapters.selected import base_of
    from pimerge.core.errors import Problems
    from pimerge.core.files import json_text, require_absent, require_same_or_absent, write_file
    from pimerge.evaluation.compare import compare as run
    from pimerge.evaluation.design import ComparisonDesign, usual_controls
    from pimerge.tasks.task import open_task
    from pimerge.tuning.options import TrainingOptions

    if output.suffix != ".json":
        raise PimergeError(f"--output is '{output}'", "expected a name that ends in .json")
    problems = Problems()
    asked: list[str] = []
    tried: list[str] = []
    wanted, numbers, lrs = [], [], {}
    with problems.collected():
        wanted = [None if text == "all" else _number(text, "--shots", "a number or all") for text in _listed(shots)]
    with problems.collected():
        numbers = [_number(text, "--experts", "a number") for text in _listed(counts)]
    with problems.collected():
        lrs = dict(_rate(text) for text in lr or [])
    with problems.collected():
        asked, tried = _names(controls, methods)
    problems.raise_any("the options do not fit")
    pool, own, folder = _pool(experts, target, ranking, base)
    task = open_task(folder)
    document = run(
        task,
        base_of([each.expert for each in pool], own, base),
        pool,
        ComparisonDesign(
            methods=list(dict.fromkeys([*(usual_controls(task, tried) if controls is None else asked), *tried])),
            shots=list(dict.fromkeys(wanted)),
            seeds=seeds,
            experts=sorted(set(numbers)),
            options=TrainingOptions(epochs=epochs, batch_size=batch_size, holdout=holdout, class_names=class_names),
            select=select,
            lrs=lrs,
            ranked_by=rank_by,
            split=draw_from,
        ),
        output.with_suffix(".runs"),
        also=[open_task(path) for path in also_test or []],
        before=lambda: require_absent(output, force),
        device=device,
        dtype=dtype,
        track=tracker(quiet),
        note=lambda message: note(message, quiet),
    )
    if document is None:
        return
    texts = {
        output: json_text(document.model_dump()),
        output.with_suffix(".md"): _markdown(document),
        output.with_suffix(".csv"): _csv(document),
    }
    for path, text in texts.items():
        require_same_or_absent(path, text, force)
    for path, text in texts.items():
        write_file(path, text)
    if json:
        print_json(document.model_dump())
        return
    for title, rows in _tables(document):
        print_line(title)
        print_table(COLUMNS, rows, right=("experts", "trained", "deployed", "seconds"))
        print_line("")
    print_line(document.conclusion)
    note(f"→ {output}, {output.with_suffix('.md').name}, {output.with_suffix('.csv').name}", quiet)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str, option: str, expected: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise PimergeError(f"{option} has '{text}'", f"expected {expected}") from None


def _rate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise PimergeError(f"--lr is '{text}'", "expected METHOD=NUMBER, such as scratch=0.005") from None


def _names(controls: str | None, methods: str) -> tuple[list[str], list[str]]:
    """The controls that are asked for, and the methods.

    Raises:
        PimergeError: if there is no such control or method.
    """
    from pimerge.core.errors import Problems, nearest
    from pimerge.evaluation import design
    from pimerge.tuning.method import METHODS

    problems = Problems()
    chosen = [] if controls is None or controls == "none" else _listed(controls)
    for name in chosen:
        if name not in design.CONTROLS:
            problems.add(f"there is no control '{name}'", f"expected {', '.join(design.CONTROLS)}, or none")
    known = [*METHODS.names(), design.SINGLE]
    tried = [name.replace("_", "-") for name in _listed(methods)]
    for name in tried:
        if name not in known:
            problems.add(f"there is no tune method '{name}'", nearest(name, known))
    problems.raise_any("these cannot be compared")
    return chosen, tried


def _pool(
    references: list[str] | None, target: str | None, ranking_path: Path, base: str | None
) -> tuple[list[RankedExpert], Expert | None, Path]:
    """The experts, the target's own expert and the folder of its task."""
    from pimerge.adapters.ranking_document import open_ranked, read_ranking
    from pimerge.adapters.selected import open_all, pool_members, select
    from pimerge.core.errors import Problems
    from pimerge.evaluation.design import RankedExpert

    chosen = select(None, ranking_path, target, base, needed=False)
    if chosen.task_folder is None:
        raise PimergeError("the target is not known", "pass --target FOLDER (an expert's or a task's)")
    own = chosen.target
    pool = []
    if references:
        pool = [RankedExpert(expert) for expert in open_all([str(path) for path in pool_members(references)], base)]
    else:
        problems = Problems()
        for candidate in read_ranking(ranking_path).candidates:
            with problems.collected():
                pool.append(RankedExpert(open_ranked(candidate, ranking_path, base), candidate.score, candidate.gain))
        problems.raise_any("some experts of the ranking cannot be opened")
    others = [each for each in pool if own is None or each.expert.sha256 != own.sha256]
    return others, own, chosen.task_folder


def _tables(document: ComparisonDocument) -> list[tuple[str, list[list[str]]]]:
    """A title and rows for each number of shots and test set, best first."""
    from pimerge.evaluation.design import shots_text

    style = METRICS.load(document.metric).format
    groups: dict[tuple[int | None, str], list[ComparisonLine]] = {}
    for line in document.lines:
        groups.setdefault((line.shots, line.test), []).append(line)
    tables = []
    for (shots, test), lines in groups.items():
        seeds = max(line.seeds for line in lines)
        over = f"{seeds} seed" if seeds == 1 else f"{seeds} seeds"
        on = "" if test == "test" else f" on {test}"
        title = f"{document.target}{on}, {shots_text(shots)}, {document.metric} over {over}"
        ordered = sorted(lines, key=lambda line: -line.mean)
        tables.append((title, [_row(line, style) for line in ordered]))
    return tables


def _row(line: ComparisonLine, style: str) -> list[str]:
    points = 100 if style.endswith("%") else 1
    difference = "" if line.difference is None else f"{points * line.difference:+.1f}"
    interval = "" if line.low is None or line.high is None else f"{points * line.low:+.1f} – {points * line.high:+.1f}"
    return [
        line.method + (" (control)" if line.control else ""),
        str(line.k) if line.k else "–",
        f"{line.mean:{style}} ± {line.sd:{style}}",
        difference,
        interval,
        str(line.trained_parameters),
        str(line.deployed_parameters),
        f"{line.seconds:.1f}",
    ]


def _markdown(document: ComparisonDocument) -> str:
    """The tables as Markdown, and the conclusion."""
    parts = [f"# {document.target} on {document.base}"]
    for title, rows in _tables(document):
        table = [COLUMNS, ["---"] * len(COLUMNS), *rows]
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in table))
    return "\n\n".join([*parts, document.conclusion]) + "\n"


def _csv(document: ComparisonDocument) -> str:
    """Every run as a row for each test set."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["method", "shots", "seed", "experts", "test", document.metric, "loss", "trained", "deployed", "seconds"]
    )
    for run in document.runs:
        for test, score in run.scores.items():
            shots = "all" if run.shots is None else run.shots
            numbers = [score, run.losses[test], run.trained_parameters, run.deployed_parameters, f"{run.seconds:.3f}"]
            writer.writerow([run.method, shots, run.seed, " ".join(run.experts), test, *numbers])
    return text.getvalue()
