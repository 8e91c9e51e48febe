"""``pimerge inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pimerge.adapters.format import shown_kind
from pimerge.cli import options
from pimerge.cli.console import note, print_json, print_table
from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    from pimerge.adapters.expert import Expert
    from pimerge.embedding.store import Store
    from pimerge.reporting.inspection import Finding

DEFAULT_STORE = Path("embeddings.json")
SHOWN_MODULES = 3


def inspect(
    pools: options.Pools = None,
    base: options.BaseReference = None,
    config: options.Config = None,
    store: Annotated[
        Path | None, typer.Option(help=f"Embedding store of the experts. Default: {DEFAULT_STORE}, if it exists.")
    ] = None,
    expert_order: options.ExpertOrdering = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show the properties and problems of experts, and which of them can be ranked and merged together.

    For experts in the store, a second table summarises the Fisher information: its trace, its norm, the share of the
    trace in the largest entry, the effective number of parameters (trace² / norm²), and the modules with the largest
    shares of the trace.
    """
    from pimerge.adapters.selected import pool_members
    from pimerge.reporting.inspection import inspect as look

    opened = _open_store(store, quiet)
    findings = look(pool_members(pools or ["experts"]), base, opened, expert_order, config)
    if json:
        print_json([_document(finding) for finding in findings])
        return
    others = len(findings) - 1
    print_table(
        ["expert", "kind", "base", "rank", "alpha", "modules", "parameters", "dtype", "task", "ranks", "merges"],
        [_row(finding, others) for finding in findings],
        right=["modules", "parameters"],
    )
    if opened is not None:
        print_table(
            ["Fisher", "examples", "labels", "trace", "norm", "largest", "effective", "of all", "most in"],
            [_fisher_row(finding) for finding in findings],
            right=["examples", "trace", "norm", "largest", "effective", "of all"],
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
    task = finding.task.file.type if finding.task else "–"
    if finding.task and finding.task.labels:
        task += f", {len(finding.task.labels)} labels"
    return [
        expert.name,
        shown_kind(expert.kind, expert.format),
        str(expert.config.get("base_model_name_or_path") or "–"),
        "/".join(map(str, expert.ranks)) or "–",
        "/".join(f"{alpha:g}" for alpha in _alphas(expert)) or "–",
        str(len(expert.parts)),
        str(expert.parameters),
        "/".join(expert.dtypes),
        task,
        "no" if finding.problems else ranks,
        merges if finding.merges_with or not finding.problems else "no",
    ]


def _open_store(store: Path | None, quiet: bool) -> Store | None:
    """Open the given store, or the default store if it exists and can be read."""
    from pimerge.embedding.store import Store, open_store

    if store is not None:
        return open_store(store)
    try:
        return Store(DEFAULT_STORE) if DEFAULT_STORE.is_file() else None
    except PimergeError as error:  # the user did not ask for this store
        note(f"Fisher information is not shown: {error.problems[0].message}", quiet)
        return None


def _fisher_row(finding: Finding) -> list[str]:
    name = finding.expert.name if finding.expert else finding.path.name
    fisher = finding.fisher
    if fisher is None:
        return [name, *["–"] * 7, finding.no_fisher]
    return [
        name,
        str(fisher.examples),
        fisher.labels,
        f"{fisher.trace:.3g}",
        f"{fisher.norm:.3g}",
        f"{fisher.largest_share:.2%}",
        f"{fisher.effective:.1f}",
        f"{fisher.effective_share:.2%}",
        ", ".join(f"{name} {share:.1%}" for name, share in list(fisher.shares.items())[:SHOWN_MODULES]),
    ]


def _document(finding: Finding) -> dict[str, Any]:
    expert = finding.expert
    known: dict[str, Any] = {}
    if expert is not None:
        known = {
            "kind": expert.kind,
            "format": expert.format,
            "base": expert.config.get("base_model_name_or_path"),
            "ranks": list(expert.ranks),
            "alphas": _alphas(expert),
            "modules": len(expert.parts),
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
        "fisher": asdict(finding.fisher) if finding.fisher else None,
        "no_fisher": finding.no_fisher,
        "problems": list(map(asdict, finding.problems)),
    }


def _alphas(expert: Expert) -> list[float]:
    return sorted({module.alpha for module in expert.modules.values()})


def _grouped(reasons: dict[str, str]) -> dict[str, Sequence[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name)
    return dict(grouped)
