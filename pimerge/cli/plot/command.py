"""``pimerge plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_json, print_table, tracker
from pimerge.core.errors import PimergeError, Problems
from pimerge.reporting.figures import Options

SUFFIXES = (".png", ".svg", ".json")
EVERYWHERE = {"name", "figures", "data", "output", "force", "json", "quiet"}


def plot(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help=options.listing("figures"), show_default=False)] = None,
    experts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Experts: names in the store or the ranking, or folders. Default: all.", show_default=False
        ),
    ] = None,
    figures: Annotated[bool, typer.Option("--figures", help="List the plots.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Draw this data, which the same plot has written, and compute nothing.")
    ] = None,
    target: options.TargetReference = None,
    measure: Annotated[str, typer.Option(help="graph: a measure of the store.")] = Options.measure,
    step: Annotated[float, typer.Option(help="path: from one α to the next.")] = Options.step,
    grid: Annotated[int, typer.Option(help="landscape: points of a side.")] = Options.grid,
    coefficients: Annotated[
        list[Path] | None, typer.Option(help="landscape: a merge's or a tuning's weights, to be shown too; repeatable.")
    ] = None,
    tuned: Annotated[Path, typer.Option(help="weights: what 'pimerge tune' has written.")] = Path("tuned"),
    k: Annotated[int | None, typer.Option("-k", help="shots, shift: how many experts were at hand.")] = None,
    shots: Annotated[str | None, typer.Option(help="experts, shift: examples of each class, or all.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most test examples of the target to look at.")] = Options.limit,
    seed: options.Seed = 0,
    store: options.StorePath = Path("embeddings.json"),
    ranking: options.RankingPath = Path("ranking.json"),
    path: Annotated[Path, typer.Option("--path", help="gain: the data of the plot 'path'.")] = Path("path.json"),
    comparison: Annotated[Path, typer.Option(help="shots, experts, shift: what 'pimerge compare' has written.")] = Path(
        "comparison.json"
    ),
    base: options.BaseReference = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Writes OUTPUT.png, OUTPUT.svg, OUTPUT.json. Default: the plot's name."),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw what the other commands have found: a picture as PNG and SVG, and its data as JSON."""
    from pimerge.core import plugins

    if figures:
        _print_figures(json)
        return
    if name is None:
        raise PimergeError(
            "no plot was named", f"name one of {options.names('pimerge.reporting.figures')}: pimerge plot --figures"
        )
    from pimerge.cli.plot.sources import Sources, options_of, read_data, source_of
    from pimerge.core.files import json_text, require_absent, write_files
    from pimerge.reporting.figures._canvas import pictures, require_libraries

    figure = plugins.load("pimerge.reporting.figures", name)
    _refuse_others(context, name, set() if data else options_of(figure))
    require_libraries()
    files = {suffix: _beside(output or Path(name), suffix) for suffix in SUFFIXES}
    for file in files.values():
        if file != data:  # the data that is drawn may lie where it would be written
            require_absent(file, force)
    if data is not None:
        found = read_data(figure, name, data)
    else:
        asked = Options(
            experts=tuple(experts or ()),
            measure=measure,
            step=step,
            grid=grid,
            coefficients=tuple(coefficients or ()),
            k=k,
            shots=shots,
            limit=limit,
            seed=seed,
            device=device,
            dtype=dtype,
            track=tracker(quiet),
            note=lambda message: note(message, quiet),
        )
        found = figure.collect(
            source_of(figure, Sources(store, ranking, path, comparison, tuned, target, base), asked.experts), asked
        )
    document = found.model_dump()
    drawn = {**pictures(lambda: figure.draw(found)), ".json": json_text(document).encode()}
    write_files({files[suffix]: content for suffix, content in drawn.items()})
    if json:
        print_json(document)
    note("→ " + ", ".join(str(file) for file in files.values()), quiet)


def _beside(output: Path, suffix: str) -> Path:
    """``OUTPUT.png`` for ``OUTPUT``, and for ``OUTPUT.svg``."""
    stem = output.name.removesuffix(output.suffix) if output.suffix in SUFFIXES else output.name
    return output.with_name(stem + suffix)


def _refuse_others(context: typer.Context, name: str, known: set[str]) -> None:
    """Refuse options that were given and mean nothing to the plot."""
    sources = {key: context.get_parameter_source(key) for key in context.params}
    given = {key for key, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    problems = Problems()
    for key in sorted(given - known - EVERYWHERE):
        option = "an expert" if key == "experts" else options.flag(key)
        problems.add(f"{option} means nothing to 'pimerge plot {name}'", "leave it out")
    problems.raise_any(f"some options mean nothing to 'pimerge plot {name}'")


def _print_figures(json: bool) -> None:
    from pimerge.core import plugins

    found = plugins.summaries("pimerge.reporting.figures")
    if json:
        print_json(found)
        return
    print_table(["plot", "what it shows"], [[name, summary] for name, summary in found.items()])
