"""``pimerge merge`` of adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pimerge.cli.console import note, print_json, print_table, tracker, warn
from pimerge.cli.merge.choice import Chosen, choose
from pimerge.cli.merge.request import Request
from pimerge.cli.merge.show import (
    coefficients_of,
    flat_weights,
    manifest_of,
    method_summary,
    print_plan,
    range_text,
    sources_of,
    weights_of,
)
from pimerge.core.errors import Problems

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.adapters.expert import Expert
    from pimerge.adapters.low_rank import Summary
    from pimerge.adapters.writer import Documents, Head
    from pimerge.merging.merge import Merge

LOSS_WARNING = 0.05


def run(request: Request) -> None:
    """Merge adapters into an adapter, or into a full checkpoint with ``--into``."""
    from pimerge.adapters.compatibility import refuse_over_inputs, require_alike
    from pimerge.adapters.writer import choose_head
    from pimerge.core.files import require_absent
    from pimerge.merging.dry_run import plan_of
    from pimerge.merging.merge import prepare
    from pimerge.merging.self_check import verify

    method = request.open_method()
    truncation = request.truncation()
    if not request.dry_run:
        require_absent(request.output, request.force)
    chosen = choose(request)
    request.require_globs_match(sorted({name for expert in chosen.experts for name in expert.parts}))
    refuse_over_inputs(request.output, [*chosen.experts, *([chosen.target] if chosen.target else [])])
    if request.head == "target" and chosen.target is not None:
        require_alike([*chosen.experts, chosen.target])
    if chosen.experts[0].tensor_sets:
        from pimerge.cli.merge import tensors

        tensors.run(request, chosen, method, statistics_of(request, chosen.experts, method.needs).get("fisher"))
        return
    merge = prepare(
        chosen.experts,
        chosen.weights,
        method,
        truncation=truncation,
        space=request.space,
        dtype=request.torch_dtype(),
        selected=request.selects,
        read=_reader(chosen.experts),
        **statistics_of(request, chosen.experts, method.needs),
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
        from pimerge.cli.merge.into import merge_into_base

        merge_into_base(request, merge, head, plan, deviation)
    else:
        _write(request, merge, head, chosen, deviation)


def _write(request: Request, merge: Merge, head: Head, chosen: Chosen, deviation: float | None) -> None:
    from pimerge.adapters.low_rank import relative_error
    from pimerge.adapters.writer import Layout, write_expert

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
                "weights": flat_weights(merge) or merge.weights,
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


def _documents(request: Request, merge: Merge, summaries: Sequence[Summary], deviation: float | None) -> Documents:
    from pimerge.adapters.writer import Documents

    return Documents(
        manifest_of(request, merge, summaries, deviation),
        coefficients_of(request, merge.experts, weights_of(merge, summaries)),
        _card(request, merge, summaries),
    )


def _card(request: Request, merge: Merge, summaries: Sequence[Summary]) -> str:
    from pimerge.adapters.low_rank import relative_error
    from pimerge.adapters.model_card import card
    from pimerge.adapters.writer import base_reference

    error = relative_error(summaries)

    base, _ = base_reference(merge.experts[0].base, request.output)
    ranks = sorted({s.rank for s in summaries})
    return card(
        base,
        sources_of(merge),
        merge.method.name,
        method_summary(merge.method.name),
        {**merge.method.options, "space": merge.space, "seed": merge.method.seed},
        f"rank {'/'.join(map(str, ranks))} of {len(summaries)} modules; "
        + (f"{error:.2%} of ‖ΔW‖ is lost." if error else "nothing is lost."),
        f"""
from peft import PeftModel
from transformers import AutoModel  # or the Auto class of your task

model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), "path/to/this/folder")
""",
        adapter=True,
    )


def _reader(experts: Sequence[Expert]) -> Callable[[Expert, str], Any]:
    """What reads the experts' factors: with the base's weights where something has to be converted."""
    from pimerge.adapters.base_weights import base_weights
    from pimerge.adapters.conversion import converting
    from pimerge.adapters.expert import Expert

    layouts = {name: module for e in experts for name, module in e.modules.items() if module.conversions}
    if not layouts:
        return Expert.factors
    transposed = any(bool(expert.config.get("fan_in_fan_out")) for expert in experts)
    return converting(base_weights(experts[0].base, layouts, fan_in_fan_out=transposed))


def statistics_of(request: Request, experts: Sequence[Expert], needs: Sequence[str]) -> dict[str, Any]:
    """What the store knows that the method needs: Fisher information or Gram matrices."""
    if not {"fishers", "grams"} & set(needs):
        return {}
    from pimerge.embedding.store import open_store

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
