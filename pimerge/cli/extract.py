"""``pimerge extract``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import done_before, note, print_json, print_table, tracker
from pimerge.merging.request import DTYPE

if TYPE_CHECKING:
    from pimerge.merging.extraction.changes import LeftOut

_SHOWN = 3


def extract(
    finetuned: Annotated[str, typer.Argument(help="Full checkpoint: a folder or a safetensors file.")],
    base: Annotated[str, typer.Option(help="What it was fine-tuned from: a folder, a safetensors file or a Hub id.")],
    rank: Annotated[
        str,
        typer.Option(
            help="Rank of the result: a number, max (every direction above the rounding of the dtype) or auto (the "
            "least that keeps --energy)."
        ),
    ] = "32",
    energy: Annotated[
        float | None, typer.Option(help="Share of ‖ΔW‖² to keep in every module. Default with --rank auto: 0.99.")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Extract only modules that match this glob, such as '*.q_proj'; repeatable."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave out modules that match; repeatable.")] = None,
    dtype: Annotated[str, options.of(DTYPE)] = "float32",
    seed: options.Seed = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("extracted"),
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn a full fine-tune into a LoRA, so that it can join a pool of adapters.

    Each changed weight of a Linear, Conv1D, convolution or embedding layer becomes the best B A of its rank, and the
    table gives the error that it really has. Modules that the base lacks are saved whole. What changed but does not fit
    a LoRA, such as norms and biases, is listed.
    """
    from pimerge.merging.extraction.extract import extract as extract_lora

    with done_before(json, quiet):
        found = extract_lora(
            finetuned,
            base=base,
            rank=rank,
            energy=energy,
            include=include or [],
            exclude=exclude or [],
            dtype=dtype,
            seed=seed,
            output=output,
            force=force,
            track=tracker(quiet),
            note=partial(note, quiet=quiet),
        )
    if json:
        print_json(found.to_dict())
        return
    rows = [[s.name, str(s.rank), f"{s.error:.2%}", _percent(found.sizes[s.name])] for s in found.modules]
    rows.append(["all", str(max(s.rank for s in found.modules)), f"{found.error:.2%}", ""])
    print_table(["module", "rank", "error", "change"], rows, right=["rank", "error", "change"])
    if found.left_out:
        print_table(["left out", "tensors", "change", "such as"], _grouped(found.left_out), right=["tensors"])
    if found.head:
        note(f"saved whole: {', '.join(found.head)}", quiet)
    note(
        f"→ {output}; error: ‖ΔW − B A‖ / ‖ΔW‖ ({found.error_of_all:.2%} with what is left out); change: ‖ΔW‖ / ‖W0‖",
        quiet,
    )


def _percent(size: float | None) -> str:
    return "–" if size is None else f"{size:.2%}"


def _grouped(left_out: list[LeftOut]) -> list[list[str]]:
    """One row for each reason."""
    groups: dict[str, list[LeftOut]] = {}
    for each in left_out:
        groups.setdefault(each.why, []).append(each)
    rows = []
    for why, group in groups.items():
        sizes = [each.size for each in group if each.size is not None]
        largest = f"up to {max(sizes):.2%}" if len(sizes) > 1 else _percent(sizes[0] if sizes else None)
        rows.append([why, str(len(group)), largest, ", ".join(each.name for each in group[:_SHOWN])])
    return rows
