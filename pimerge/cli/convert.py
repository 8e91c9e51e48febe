"""``pimerge convert``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import done_before, note, print_json, print_line, tracker


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or file of an adapter or a model, or the Hub id of an adapter.", show_default=False
        ),
    ],
    rank: Annotated[
        str | None,
        typer.Option(
            help="Turn an adapter of any kind with updates ΔW into a LoRA of this rank: a number, max (lossless) or "
            "auto (the least that keeps --energy). Default: its kind stays."
        ),
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of ‖ΔW‖² to keep in every module; stands for --rank auto.")
    ] = None,
    base: options.BaseReference = None,
    config: options.Config = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write, or a .safetensors file for a single file.")
    ] = Path("converted"),
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Bring an adapter or a checkpoint to the files that today's libraries read.

    Weights in PyTorch's pickles (.bin, .pt, .pth, .ckpt) become safetensors; a pickle is read without running its code.
    With --rank, an adapter of another kind, such as LoHa, becomes a LoRA of that rank.
    """
    from pimerge.merging.convert import convert as convert_source

    with done_before(json, quiet):
        converted = convert_source(
            source,
            rank=rank,
            energy=energy,
            base=base,
            config=config,
            output=output,
            force=force,
            track=tracker(quiet),
            note=partial(note, quiet=quiet),
        )
    if converted.merged is not None:
        from pimerge.cli.merge.show import show

        show(converted.merged, as_json=json, say=partial(note, quiet=quiet))
    elif json:
        print_json(converted.to_dict())
    else:
        print_line(converted.summary)
        note(f"→ {converted.path}", quiet)
