"""What is said and written about a merge of adapters: the plan, the manifest, the coefficients, the sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from pimerge.cli.console import print_json, print_table, size_text
from pimerge.cli.merge.request import Request

if TYPE_CHECKING:
    from pimerge.adapters.expert import Expert
    from pimerge.adapters.low_rank import Summary
    from pimerge.adapters.model_card import Source
    from pimerge.adapters.writer import Coefficients
    from pimerge.core.manifest import Manifest
    from pimerge.merging.dry_run import Plan
    from pimerge.merging.merge import Merge


def print_plan(request: Request, merge: Merge, plan: Plan) -> None:
    """What ``--dry-run`` says."""
    experts: list[dict[str, Any]] = [
        {
            "name": expert.name,
            "weight": weight_text(merge, place),
            "scale": expert.strength,
            "rank": "/".join(map(str, expert.ranks)),
            "dtype": "/".join(expert.dtypes),
            "sha256": expert.sha256,
        }
        for place, expert in enumerate(merge.experts)
    ]
    document = {
        "output": str(request.output),
        "method": merge.method.name,
        "options": merge.method.options,
        "experts": experts,
        **asdict(plan),
        "dtype": str(merge.dtype).removeprefix("torch."),
    }
    if request.json:
        print_json(document)
        return
    print_table(
        ["expert", "weight", "rank", "dtype", "SHA-256"],
        [[e["name"], e["weight"], e["rank"], e["dtype"], e["sha256"][:12]] for e in experts],
        right=["weight", "rank"],
    )
    rows = [["merged", f"{plan.modules} modules by '{merge.method.name}'"]]
    rows += [["handled", sentence] for sentence in plan.handled]
    rows += [["left out", sentence] for sentence in plan.left_out or ["nothing"]]
    rows += [["memory", f"about {size_text(plan.memory)} for the largest module"]]
    rows += [
        ["output", f"{request.output}, at most {size_text(plan.size)} in {document['dtype']}; nothing is written now"]
    ]
    print_table(["", ""], rows)


class Weighted(Protocol):
    """A merge as far as its weights are concerned."""

    @property
    def experts(self) -> Sequence[Expert]:
        """Those that are merged."""

    @property
    def weights(self) -> Mapping[str, Sequence[float]]:
        """Module or group → one weight per expert."""


def weight_text(merge: Weighted, place: int) -> str:
    """An expert's weight as it was asked for, or its range over the modules."""
    return range_text(list(merge.weights.values()), place)


def range_text(rows: Sequence[Sequence[float]], place: int) -> str:
    """A number of some rows, or its range if it is not the same in all."""
    values = sorted({row[place] for row in rows})
    return f"{values[0]:.3f}" if len(values) == 1 else f"{values[0]:.3f} to {values[-1]:.3f}"


def flat_weights(merge: Weighted) -> list[float] | None:
    """The weights, if they are the same in every module."""
    rows = list(merge.weights.values())
    return list(rows[0]) if all(list(row) == list(rows[0]) for row in rows) else None


def manifest_of(request: Request, merge: Merge, summaries: Sequence[Summary], deviation: float | None) -> Manifest:
    """The content of ``pimerge.json``, but for the hashes of what lies beside it."""
    from pimerge.adapters.low_rank import relative_error
    from pimerge.core.manifest import Manifest, inputs_of, library_versions

    results: dict[str, Any] = {
        "truncation": relative_error(summaries),
        "modules": {s.name: {"rank": s.rank, "truncation": s.error} for s in summaries},
    }
    if deviation is not None:
        results["verified"] = deviation
    options = {
        "method": request.method,
        **merge.method.options,
        "weights": flat_weights(merge) or {name: list(values) for name, values in merge.weights.items()},
        "scales": [expert.strength for expert in merge.experts],
        "space": request.space,
        "seed": request.seed,
        "rank": request.rank,
        "energy": merge.truncation.energy,
        "include": list(request.include),
        "exclude": list(request.exclude),
        "head": request.head,
        "dtype": request.dtype or str(merge.dtype).removeprefix("torch."),
    }
    return Manifest(
        command="merge",
        options=options,
        device="cpu",
        versions=library_versions(),
        inputs=inputs_of(merge.experts),
        outputs={},
        results=results,
    )


def weights_of(merge: Merge, summaries: Sequence[Summary]) -> dict[str, list[float]]:
    """Module → what each update was multiplied by, or the method's weights."""
    return {s.name: list(s.coefficients or merge.weights[s.name]) for s in summaries}


def coefficients_of(request: Request, experts: Sequence[Expert], weights: Mapping[str, list[float]]) -> Coefficients:
    """The content of ``coefficients.json``.

    Args:
        weights: module or group → one number per expert.
    """
    from pimerge.adapters.writer import Coefficients
    from pimerge.core.files import relative_to

    rows = list(weights.values())
    return Coefficients(
        method=request.method,
        granularity="global" if all(row == rows[0] for row in rows) else "matrix",
        experts=[relative_to(expert.path, request.output) for expert in experts],
        sha256=[expert.sha256 for expert in experts],
        scales=[expert.strength for expert in experts],
        experts_trained=False,
        weights=dict(weights),
    )


def sources_of(merge: Weighted) -> list[Source]:
    """The experts, for the model card."""
    from pimerge.adapters.model_card import Source, licence_of

    return [
        Source(expert.name, expert.sha256, licence_of(expert.path), weight_text(merge, place), expert.strength)
        for place, expert in enumerate(merge.experts)
    ]


def method_summary(method: str) -> str:
    """One line on a method, for the model card."""
    from pimerge.merging.method import METHODS

    strategy = METHODS.load(method)
    return f"{strategy.summary} {strategy.formula} ({strategy.paper})."
