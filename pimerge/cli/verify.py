"""``pimerge verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_json, print_line, print_table, tracker

if TYPE_CHECKING:
    from pimerge.merging.verification.verdict import CheckedModule

EXIT_NOT_EQUAL = 4


def verify(
    merged: Annotated[str, typer.Argument(help="The merge to check: a full checkpoint or an adapter, by any program.")],
    experts: Annotated[
        list[str], typer.Argument(help="What was merged: adapters, or full checkpoints relative to --base.")
    ],
    weights: Annotated[
        str | None, typer.Option(help="The weights of the merge, one per expert, such as 0.6,0.4. Default: 1/N each.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model: folder, safetensors file or Hub id. Default: the base that the experts name. Not needed "
            "if all are adapters."
        ),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check whether a checkpoint or adapter, made by any program, is the merge that it claims to be.

    The claim is W = W0 + Σ w ΔW. Every module is compared with it, up to rounding. If it differs, the cause is named:
    the adapter was never applied, another scaling or other weights, A and B averaged apart, a transposed or truncated
    update. Tensors that no expert changes must equal the base's.

    The exit status is 4 unless the merge is equal to the claim. (The option --verify of 'pimerge merge' is another
    check: of the merge itself, before it is written.)
    """
    from pimerge.merging.verification.verify import verify as check

    found = check(
        merged,
        experts=experts,
        weights=None if weights is None else options.numbers(weights, "--weights"),
        base=base,
        track=tracker(quiet),
    )
    if json:
        print_json(found.to_dict())
    else:
        rows = [_row(each) for each in (*found.modules, *found.beside)]
        total = "–" if found.error is None else f"{found.error:.2e}"
        rows.append(["all", total, "", str(found.verdict), ""])
        print_table(["module", "error", "rounding", "verdict", ""], rows, right=["error", "rounding"])
        for line in found.summary:
            print_line(line)
        for remark in found.remarks:
            note(remark, quiet)
        note("error: ‖found − claimed‖ / ‖claimed ΔW‖; rounding: the most that the dtype can cause", quiet)
    if not found.equal:
        raise typer.Exit(EXIT_NOT_EQUAL)


def _row(found: CheckedModule) -> list[str]:
    numbers = ["–" if value is None else f"{value:.2e}" for value in (found.error, found.rounding)]
    detail = found.explanation
    if found.factor is not None:
        detail += f" (× {found.factor:.4g})"
    elif found.weights:
        closest = "closest: " if found.verdict == "other" else ""
        detail += f" ({closest}{', '.join(f'{w:.3g}' for w in found.weights)})"
    elif found.rank is not None:
        detail += f" ({found.rank})"
    return [found.name, *numbers, str(found.verdict), detail]
