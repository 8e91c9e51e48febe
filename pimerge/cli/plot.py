"""``pimerge plot``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_json, print_table, tracker
from pimerge.core.errors import PimergeError, Problems
from pimerge.reporting.figure import FIGURES, Figure, FigureInputs

SUFFIXES = (".png", ".svg", ".json")


@options.with_options_of(FIGURES)
def plot(
    context: typer.Context,
    settings: dict[str, Any],
    name: Annotated[
        str | None, typer.Argument(help=f"Name of the plot: {', '.join(FIGURES.names())}.", show_default=False)
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Argument(help="Experts: names in the store or ranking, or folders. Default: all.", show_default=False),
    ] = None,
    figures: Annotated[bool, typer.Option("--figures", help="List the plots and exit.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Draw the data from this JSON file of the same plot, and compute nothing.")
    ] = None,
    target: options.TargetReference = None,
    store: options.StorePath = FigureInputs.store,
    ranking: options.RankingPath = FigureInputs.ranking,
    path: Annotated[Path, typer.Option("--path", help="Result of 'pimerge plot path'.")] = FigureInputs.path,
    comparison: Annotated[Path, typer.Option(help="Result of 'pimerge compare'.")] = FigureInputs.comparison,
    tuned: Annotated[Path, typer.Option(help="Result of 'pimerge tune'.")] = FigureInputs.tuned,
    base: options.BaseReference = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write OUTPUT.png, OUTPUT.svg and OUTPUT.json. Default: the plot's name."),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Plot the results of the other commands.

    Writes the picture as PNG and SVG, and its data as JSON.
    """
    if figures:
        _print_figures(json)
        return
    if name is None:
        raise PimergeError(
            "no plot was named", f"name one of {', '.join(FIGURES.names())}; 'pimerge plot --figures' describes them"
        )
    from pimerge.core.files import json_text, output_lock, write_files
    from pimerge.core.replacing import require_same_or_absent
    from pimerge.reporting.figures._canvas import pictures, require_libraries

    figure = FIGURES.load(name)
    inputs = FigureInputs(
        experts=tuple(experts or ()),
        target=target,
        store=store,
        ranking=ranking,
        path=path,
        comparison=comparison,
        tuned=tuned,
        base=base,
        device=device,
        dtype=dtype,
        track=tracker(quiet),
        note=partial(note, quiet=quiet),
    )
    _refuse_unread_inputs(context, figure if data is None else replace(figure, inputs=()))
    given = FIGURES.given_options(figure if data is None else replace(figure, options={}), settings)
    require_libraries()
    files = {suffix: _beside(output or Path(figure.name), suffix) for suffix in SUFFIXES}
    first = next(iter(files.values()))
    with output_lock(first.with_suffix(""), inputs.note):
        found = figure.read(data) if data is not None else figure.compute(figure.open(inputs), inputs, **given)
        document = figure.document(found)
        drawn = {**pictures(lambda: figure.draw(found)), ".json": json_text(document).encode()}
        contents = {files[suffix]: content for suffix, content in drawn.items()}
        for file, content in contents.items():
            if file != data:  # the input may be the file that is written
                require_same_or_absent(file, content, force)
        write_files(contents)
    if json:
        print_json(document)
    note("→ " + ", ".join(str(file) for file in files.values()), quiet)


def _beside(output: Path, suffix: str) -> Path:
    """Return ``OUTPUT.png`` for ``OUTPUT``, and for ``OUTPUT.svg``."""
    stem = output.name.removesuffix(output.suffix) if output.suffix in SUFFIXES else output.name
    return output.with_name(stem + suffix)


def _refuse_unread_inputs(context: typer.Context, figure: Figure[Any, Any]) -> None:
    """Refuse given inputs that the figure does not read."""
    sources = {name: context.get_parameter_source(name) for name in vars(FigureInputs()) if name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    problems = Problems()
    for name in sorted(given - set(figure.inputs)):
        what = "experts" if name == "experts" else f"--{name}"
        problems.add(f"'pimerge plot {figure.name}' does not read {what}", "leave it out")
    problems.raise_any(f"'pimerge plot {figure.name}' does not read some of the options")


def _print_figures(json: bool) -> None:
    found = {figure.name: figure.summary for figure in FIGURES}
    if json:
        print_json(found)
    else:
        print_table(["plot", "what it shows"], list(found.items()))
