"""``pimerge merge``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_json, print_table
from pimerge.cli.inputs import open_all, parse_numbers, parse_rank, select
from pimerge.errors import PimergeError

if TYPE_CHECKING:
    from pimerge.expert import Expert
    from pimerge.export import Coefficients


def merge(
    experts: options.Experts = None,
    method: Annotated[str, typer.Option(help=options.listing("merge_methods"))] = "uniform",
    weights: Annotated[
        str | None, typer.Option(help="Weights of the experts given, in their order: 0.6,0.4. They need not sum to 1.")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="The target's share in 'interpolated'; the others divide the rest by the softmax of their "
            "scores. Default: 1/(k+1)."
        ),
    ] = None,
    coefficients: Annotated[
        Path | None, typer.Option(help="Weights per module and expert, as tune writes them: tuned/coefficients.json.")
    ] = None,
    rank: options.Rank = "max",
    head: Annotated[str, typer.Option(help="Task head of the result: target, average or none.")] = "target",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the experts' own.")] = None,
    target: options.TargetReference = None,
    ranking: options.RankingPath = Path("ranking.json"),
    base: options.BaseReference = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the merged expert.")] = Path("merged"),
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Combine experts into one without training, exactly in ΔW; the base model is not loaded.

    'uniform' takes the experts that the ranking selected; 'interpolated' takes the target's own expert and those.
    """
    from pimerge import strategies
    from pimerge.compatibility import refuse_over_inputs, require_alike
    from pimerge.export import Coefficients, choose_head, write_expert
    from pimerge.files import relative_to, require_absent
    from pimerge.lowrank import relative_error
    from pimerge.manifest import Manifest, inputs_of, library_versions
    from pimerge.merging import merge as merge_experts

    strategy = strategies.load("merge_methods", method)
    require_absent(output, force)
    kept_rank = parse_rank(rank)
    if coefficients is not None:
        chosen, by_module, own = _from_coefficients(coefficients, weights, alpha, experts, base, quiet)
        given: Any = by_module
    else:
        chosen, given, own = _from_options(experts, method, weights, alpha, ranking, target, base)
        given = strategy.weights(len(chosen), given)
    if coefficients is not None:
        own = select(None, ranking, target, base, needed=False).target
    refuse_over_inputs(output, [*chosen, *([own] if own else [])])
    if head == "target" and own is not None:
        require_alike([*chosen, own])
    merged = merge_experts(chosen, given, strategy.merge, rank=kept_rank, dtype=_dtype(dtype))
    error = relative_error(merged)
    reference = own or chosen[0]
    flat = given if isinstance(given, list) else None
    written = write_expert(
        output,
        merged,
        choose_head(head, chosen, own),
        base=chosen[0].base,
        like={
            **reference.config,
            "fan_in_fan_out": any(expert.config.get("fan_in_fan_out") for expert in chosen),
        },
        coefficients=Coefficients(
            method=method,
            granularity="global" if flat else "matrix",
            experts=[relative_to(expert.path, output) for expert in chosen],
            sha256=[expert.sha256 for expert in chosen],
            experts_trained=False,
            weights={module.module.name: list(flat or given[module.module.name]) for module in merged},
        ),
        manifest=Manifest(
            command="merge",
            options={"method": method, "weights": given, "rank": rank, "head": head, "dtype": dtype},
            device="cpu",
            versions=library_versions(),
            inputs=inputs_of(chosen),
            outputs={},
            results={
                "truncation": error,
                "modules": {m.module.name: {"rank": m.rank, "truncation": m.error} for m in merged},
            },
        ),
        force=force,
    )
    result = {"output": str(output), "method": method, **written.results}
    if json:
        print_json({**result, "experts": [e.name for e in chosen], "weights": given})
        return
    print_table(
        ["module", "rank", "error"],
        [[m.module.name, str(m.rank), f"{m.error:.2%}"] for m in merged]
        + [["all", str(max(m.rank for m in merged)), f"{error:.2%}"]],
        right=["rank", "error"],
    )
    if flat:
        note(", ".join(f"{expert.name} {weight:.3f}" for expert, weight in zip(chosen, flat, strict=True)), quiet)
    note(f"→ {output}; error: ‖ΔW − ΔW_rank‖ / ‖ΔW‖; next: pimerge eval {output}", quiet)


def _from_options(
    references: list[str] | None,
    method: str,
    weights: str | None,
    alpha: float | None,
    ranking: Path,
    target: str | None,
    base: str | None,
) -> tuple[list[Expert], list[float] | None, Expert | None]:
    """Experts, their weights if the method takes any, and the target's expert."""
    chosen = select(references, ranking, target, base)
    experts, own, scores = chosen.experts, chosen.target, chosen.scores
    given = parse_numbers(weights, "--weights") if weights is not None else None
    if method == "uniform" and alpha is not None:
        raise PimergeError("--alpha is for 'interpolated'", "leave it out, or pass --method interpolated")
    if given is not None and alpha is not None:
        raise PimergeError("--weights and --alpha exclude each other", "the weights hold the target's share already")
    if method != "interpolated":
        _match(given, experts)
        return experts, given, own
    others = [i for i, expert in enumerate(experts) if own is None or expert.sha256 != own.sha256]
    if references is None and own is not None:
        experts = [own, *(experts[i] for i in others)]
        scores = [None, *(scores[i] for i in others)]
    if given is None:
        given = _shares(experts, own, scores, alpha)
    _match(given, experts)
    return experts, given, own


def _match(given: list[float] | None, experts: list[Expert]) -> None:
    if given is not None and len(given) != len(experts):
        names = ", ".join(expert.name for expert in experts)
        raise PimergeError(
            f"--weights holds {len(given)} numbers for {len(experts)} experts ({names})", "give one for each, in order"
        )


def _shares(
    experts: list[Expert], own: Expert | None, scores: list[float | None], alpha: float | None
) -> list[float] | None:
    """α for the target's expert and (1 − α)·softmax(scores) for the others; None where a score is missing."""
    others = [i for i, expert in enumerate(experts) if own is None or expert.sha256 != own.sha256]
    known = [score for i in others if (score := scores[i]) is not None]
    if len(known) < len(others):
        return None
    has_own = len(others) < len(experts)
    if alpha is not None and not has_own:
        raise PimergeError("--alpha is the target's share, and the target's expert is not among the experts")
    if alpha is not None and not 0 <= alpha <= 1:
        raise PimergeError(f"--alpha is {alpha}", "expected a share from 0 to 1")
    share = (1 / len(experts) if alpha is None else alpha) if has_own else 0.0
    exponentials = [math.exp(score - max(known)) for score in known]
    soft = iter([(1 - share) * value / sum(exponentials) for value in exponentials])
    return [next(soft) if i in others else share for i in range(len(experts))]


def _from_coefficients(
    path: Path, weights: str | None, alpha: float | None, references: list[str] | None, base: str | None, quiet: bool
) -> tuple[list[Expert], dict[str, list[float]], Expert | None]:
    from pimerge.export import Coefficients
    from pimerge.task import parse_document

    if weights is not None or alpha is not None:
        raise PimergeError("--coefficients excludes --weights and --alpha", "it holds the weights already")
    document: Coefficients = parse_document(Coefficients, path, "expected the coefficients.json of a tuned expert")
    chosen = open_all(references or [str(path.parent / expert) for expert in document.experts], base)
    if [expert.sha256 for expert in chosen] != document.sha256:
        raise PimergeError(
            f"the experts are not those of '{path}', or have changed since",
            "expected in this order: " + ", ".join(document.experts),
        )
    if document.experts_trained:
        note("the experts were trained together with these weights, so the merge differs from what was tuned", quiet)
    return chosen, document.weights, None


def _dtype(name: str | None) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise PimergeError(f"--dtype is '{name}'", f"expected {', '.join(known)}")
    return known[name] if name else None
