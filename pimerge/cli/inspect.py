"""``pimerge inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_json, print_table

if TYPE_CHECKING:
    from pimerge.expert import Expert
    from pimerge.inspection import Finding


def inspect(
    pools: Annotated[
        list[str] | None, typer.Argument(help="Pools (folders of experts), experts, or Hub ids. Default: ./experts.")
    ] = None,
    base: options.BaseReference = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what each expert is, whether it can be ranked and merged with the others, and its problems."""
    from pimerge.cli.inputs import pool_members
    from pimerge.inspection import inspect as look

    findings = look(pool_members(pools or ["experts"]), base)
    if json:
        print_json([_document(finding) for finding in findings])
        return
    others = len(findings) - 1
    print_table(
        ["expert", "kind", "base", "rank", "alpha", "modules", "parameters", "dtype", "task", "ranks", "merges"],
        [_row(finding, others) for finding in findings],
        right=["modules", "parameters"],
    )
    for finding in findings:
        name = finding.expert.name if finding.expert else str(finding.path)
        for problem in finding.problems:
            note(f"{name}: {problem.message}" + (f"\n  → {problem.hint}" if problem.hint else ""), quiet=False)
        if not finding.problems:
            for reason, names in _grouped(finding.not_ranked).items():
                note(f"{name} cannot be ranked with {', '.join(names)}: {reason}", quiet)


def _row(finding: Finding, others: int) -> list[str]:
    expert = finding.expert
    if expert is None:
        return [finding.path.name, *["–"] * 8, "no", "no"]
    ranks, merges = f"{len(finding.ranks_with)}/{others}", f"{len(finding.merges_with)}/{others}"
    task = f"{finding.task.file.type}, {len(finding.task.labels)} labels" if finding.task else "–"
    return [
        expert.name,
        expert.kind,
        str(expert.config.get("base_model_name_or_path")),
        "/".join(map(str, expert.ranks)),
        "/".join(f"{alpha:g}" for alpha in _alphas(expert)),
        str(len(expert.modules)),
        str(expert.parameters),
        "/".join(expert.dtypes),
        task,
        "no" if finding.problems else ranks,
        merges if finding.merges_with or not finding.problems else "no",
    ]


def _document(finding: Finding) -> dict[str, Any]:
    expert = finding.expert
    known: dict[str, Any] = {}
    if expert is not None:
        known = {
            "kind": expert.kind,
            "base": expert.config.get("base_model_name_or_path"),
            "ranks": list(expert.ranks),
            "alphas": _alphas(expert),
            "modules": len(expert.modules),
            "parameters": expert.parameters,
            "dtypes": list(expert.dtypes),
            "sha256": expert.sha256,
            "task": finding.task.file.model_dump(exclude_none=True) if finding.task else None,
        }
    return {
        "expert": expert.name if expert else finding.path.name,
        "path": str(finding.path),
        **known,
        "ranks_with": list(finding.ranks_with),
        "merges_with": list(finding.merges_with),
        "not_ranked": finding.not_ranked,
        "not_merged": finding.not_merged,
        "problems": [{"message": problem.message, "hint": problem.hint} for problem in finding.problems],
    }


def _alphas(expert: Expert) -> list[float]:
    return sorted({module.alpha for module in expert.modules.values()})


def _grouped(reasons: dict[str, str]) -> dict[str, Sequence[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name)
    return dict(grouped)
