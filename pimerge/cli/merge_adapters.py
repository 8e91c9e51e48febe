"""``pimerge merge`` of adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pimerge.cli.console import note, print_json, print_table, size_text, tracker, warn
from pimerge.cli.merge_choice import Chosen, choose
from pimerge.cli.merge_request import Request
from pimerge.errors import Problems

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.expert import Expert
    from pimerge.export import Coefficients, Documents, Head
    from pimerge.lowrank import Summary
    from pimerge.manifest import Manifest
    from pimerge.merging import Merge
    from pimerge.planning import Plan

LOSS_WARNING = 0.05


def run(request: Request) -> None:
    """Merge adapters into an adapter, or into a full checkpoint with ``--into``."""
    from pimerge.compatibility import refuse_over_inputs, require_alike
    from pimerge.export import choose_head
    from pimerge.files import require_absent
    from pimerge.merging import prepare
    from pimerge.planning import plan_of
    from pimerge.verification import verify

    method = request.open_method()
    truncation = request.truncation()
    if not request.dry_run:
        require_absent(request.output, request.force)
    chosen = choose(request)
    request.require_globs_match(sorted({name for expert in chosen.experts for name in expert.modules}))
    refuse_over_inputs(request.output, [*chosen.experts, *([chosen.target] if chosen.target else [])])
    if request.head == "target" and chosen.target is not None:
        require_alike([*chosen.experts, chosen.target])
    merge = prepare(
        chosen.experts,
        chosen.weights,
        method,
        truncation=truncation,
        space=request.space,
        dtype=request.torch_dtype(),
        selected=request.selects,
        read=_reader(chosen.experts),
        **_statistics(request, chosen.experts, method.needs),
    )
    head = choose_head(request.head, chosen.experts, chosen.target)
    plan = plan_of(merge, chosen.experts, head)
    if request.dry_run and request.into is None:
        print_plan(request, merge, plan)
        return
    if not request.dry_run:
        for sentence in [*plan.handled, *(f"left out: {what}" for what in plan.left_out)]:
            note(sentence, request.quiet)
    deviation = None
    if request.verify and not request.dry_run:
        verified = verify(merge, track=tracker(request.quiet))
        deviation = verified.deviation
        note(f"verified: every expert comes back through '{verified.method}' to {deviation:.1e}", request.quiet)
    if request.into is not None:
        from pimerge.cli.merge_into import fold_into

        fold_into(request, merge, head, plan, deviation)
    else:
        _write(request, merge, head, chosen, deviation)


def print_plan(request: Request, merge: Merge, plan: Plan) -> None:
    """What ``--dry-run`` says."""
    experts = [
        {
            "name": expert.name,
            "weight": weight_text(merge, place),
            "rank": "/".join(map(str, expert.ranks)),
            "dtype": "/".join(expert.dtypes),
            "sha256": expert.sha256,
        }
        for place, expert in enumerate(merge.experts)
    ]
    document = {
        "output": str(request.output),
        "method": merge.method.name,
        "options": merge.method.resolved,
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


def weight_text(merge: Merge, place: int) -> str:
    """An expert's weight as it was asked for, or its range over the modules."""
    return range_text(list(merge.weights.values()), place)


def range_text(rows: Sequence[Sequence[float]], place: int) -> str:
    """A number of some rows, or its range if it is not the same in all."""
    values = sorted({row[place] for row in rows})
    return f"{values[0]:.3f}" if len(values) == 1 else f"{values[0]:.3f} to {values[-1]:.3f}"


def _write(request: Request, merge: Merge, head: Head, chosen: Chosen, deviation: float | None) -> None:
    from pimerge.export import Layout, write_expert
    from pimerge.lowrank import relative_error

    summaries: list[Summary] = []

    def documents(found: Sequence[Summary]) -> Documents:
        summaries.extend(found)
        return _documents(request, merge, found, deviation)

    with tracker(request.quiet)("merge", len(merge.names), "modules") as advance:

        def modules() -> Any:
            for name in merge.names:
                yield merge.module(name)
                advance(1)

        written = write_expert(
            request.output,
            Layout([merge.layout(name) for name in merge.names], merge.dtype, merge.has_bias),
            modules(),
            head,
            base=merge.experts[0].base,
            like={
                **(chosen.target or chosen.experts[0]).config,
                "fan_in_fan_out": any(expert.config.get("fan_in_fan_out") for expert in chosen.experts),
            },
            documents=documents,
            force=request.force,
        )
    error = relative_error(summaries)
    if error**2 > LOSS_WARNING:
        warn(
            f"the truncation drops {error**2:.1%} of the energy ‖ΔW‖² (error {error:.1%}): raise --rank, or keep all "
            "with --rank max"
        )
    if request.json:
        print_json(
            {
                "output": str(request.output),
                "method": request.method,
                **written.manifest.results,
                "experts": [expert.name for expert in merge.experts],
                "weights": _flat(merge) or merge.weights,
            }
        )
        return
    print_table(
        ["module", "rank", "error"],
        [[s.name, str(s.rank), f"{s.error:.2%}"] for s in summaries]
        + [["all", str(max(s.rank for s in summaries)), f"{error:.2%}"]],
        right=["rank", "error"],
    )
    used = [list(s.coefficients or merge.weights[s.name]) for s in summaries]
    note(", ".join(f"{e.name} {range_text(used, i)}" for i, e in enumerate(merge.experts)), request.quiet)
    note(f"→ {request.output}; error: ‖ΔW − ΔW_rank‖ / ‖ΔW‖; next: pimerge eval {request.output}", request.quiet)


def _flat(merge: Merge) -> list[float] | None:
    """The weights, if they are the same in every module."""
    rows = list(merge.weights.values())
    return list(rows[0]) if all(list(row) == list(rows[0]) for row in rows) else None


def _documents(request: Request, merge: Merge, summaries: Sequence[Summary], deviation: float | None) -> Documents:
    from pimerge.export import Documents

    return Documents(
        manifest_of(request, merge, summaries, deviation),
        coefficients_of(request, merge, summaries),
        _card(request, merge, summaries),
    )


def manifest_of(request: Request, merge: Merge, summaries: Sequence[Summary], deviation: float | None) -> Manifest:
    """The content of ``pimerge.json``, but for the hashes of what lies beside it."""
    from pimerge.lowrank import relative_error
    from pimerge.manifest import Manifest, inputs_of, library_versions

    results: dict[str, Any] = {
        "truncation": relative_error(summaries),
        "modules": {s.name: {"rank": s.rank, "truncation": s.error} for s in summaries},
    }
    if deviation is not None:
        results["verified"] = deviation
    options = {
        "method": request.method,
        **merge.method.resolved,
        "weights": _flat(merge) or {name: list(values) for name, values in merge.weights.items()},
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


def coefficients_of(request: Request, merge: Merge, summaries: Sequence[Summary]) -> Coefficients:
    """The content of ``coefficients.json``: what each update was multiplied by, or the method's weights."""
    from pimerge.export import Coefficients
    from pimerge.files import relative_to

    by_module = {s.name: list(s.coefficients or merge.weights[s.name]) for s in summaries}
    rows = list(by_module.values())
    return Coefficients(
        method=request.method,
        granularity="global" if all(row == rows[0] for row in rows) else "matrix",
        experts=[relative_to(expert.path, request.output) for expert in merge.experts],
        sha256=[expert.sha256 for expert in merge.experts],
        experts_trained=False,
        weights=by_module,
    )


def _card(request: Request, merge: Merge, summaries: Sequence[Summary]) -> str:
    from pimerge.card import card
    from pimerge.export import base_reference
    from pimerge.lowrank import relative_error

    error = relative_error(summaries)

    base, _ = base_reference(merge.experts[0].base, request.output)
    ranks = sorted({s.rank for s in summaries})
    return card(
        base,
        sources_of(merge),
        merge.method.name,
        method_summary(merge.method.name),
        {**merge.method.resolved, "space": merge.space, "seed": merge.method.seed},
        f"rank {'/'.join(map(str, ranks))} of {len(summaries)} modules; "
        + (f"{error:.2%} of ‖ΔW‖ is lost." if error else "nothing is lost."),
        f"""
from peft import PeftModel
from transformers import AutoModel  # or the Auto class of your task

model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), "path/to/this/folder")
""",
        adapter=True,
    )


def sources_of(merge: Merge) -> list[Any]:
    """The experts, for the model card."""
    from pimerge.card import Source, licence_of

    return [
        Source(expert.name, expert.sha256, licence_of(expert.path), weight_text(merge, place))
        for place, expert in enumerate(merge.experts)
    ]


def method_summary(method: str) -> str:
    """One line on a method, for the model card."""
    from pimerge import strategies

    return strategies.summaries("merge_methods")[method]


def _reader(experts: Sequence[Expert]) -> Callable[[Expert, str], Any]:
    """What reads the experts' factors: with the base's weights where something has to be converted."""
    from pimerge.conversion import base_weights, converting
    from pimerge.expert import Expert

    layouts = {name: module for e in experts for name, module in e.modules.items() if module.conversions}
    if not layouts:
        return Expert.factors
    transposed = any(bool(expert.config.get("fan_in_fan_out")) for expert in experts)
    return converting(base_weights(experts[0].base, layouts, fan_in_fan_out=transposed))


def _statistics(request: Request, experts: Sequence[Expert], needs: Sequence[str]) -> dict[str, Any]:
    """What the store knows that the method needs: Fisher information or Gram matrices."""
    if not {"fishers", "grams"} & set(needs):
        return {}
    from pimerge.store import open_store

    store = open_store(request.store)
    problems = Problems()
    files = {}
    command = "pimerge embed --grams" if "grams" in needs else "pimerge embed"
    for expert in experts:
        name = store.find_sha(expert.sha256)
        if name is None:
            problems.add(
                f"'{expert.name}' is not in the store '{request.store}'", f"run '{command} {expert.path}' first"
            )
            continue
        with problems.collected(f"'{expert.name}': "):
            files[expert.sha256] = store.grams(name) if "grams" in needs else store.diagonal_file(name)
    problems.raise_any(f"the store lacks what '{request.method}' needs")

    def fisher(expert: Expert, key: str) -> Tensor:
        return files[expert.sha256].read(key)

    def gram(expert: Expert, module: str) -> Tensor | None:
        file = files[expert.sha256]
        return file.read(module) if module in file.entries else None

    return {"gram": gram} if "grams" in needs else {"fisher": fisher}
