"""``pimerge merge`` of adapters without ΔW: number by number."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pimerge.cli.console import note, print_json, print_table
from pimerge.cli.merge.choice import Chosen
from pimerge.cli.merge.request import Request
from pimerge.cli.merge.show import (
    coefficients_of,
    flat_weights,
    method_summary,
    range_text,
    sources_of,
    weight_text,
)
from pimerge.core.errors import Problems
from pimerge.merging.method import OpenedMethod

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.adapters.expert import Expert
    from pimerge.adapters.writer import Documents
    from pimerge.merging.tensor_merge import TensorMerge


def run(request: Request, chosen: Chosen, method: OpenedMethod, fisher: Callable[[Expert, str], Tensor] | None) -> None:
    """Merge experts of one kind into one of that kind."""
    from pimerge.adapters.writer import choose_head, write_tensor_sets
    from pimerge.merging.tensor_merge import prepare_tensors

    _refuse_other_options(request, chosen.experts[0].kind)
    merge = prepare_tensors(
        chosen.experts,
        chosen.weights,
        method,
        dtype=request.torch_dtype(),
        selected=request.selects,
        fisher=fisher,
    )
    head = choose_head(request.head, chosen.experts, chosen.target)
    if request.dry_run:
        _print_plan(request, merge)
        return
    written = write_tensor_sets(
        request.output,
        merge.tensors,
        head,
        base=merge.experts[0].base,
        like=chosen.target or merge.experts[0],
        documents=lambda: _documents(request, merge),
        force=request.force,
    )
    if request.json:
        print_json(
            {
                "output": str(request.output),
                "method": request.method,
                "kind": merge.experts[0].kind,
                **written.manifest.results,
                "experts": [expert.name for expert in merge.experts],
                "weights": flat_weights(merge) or merge.weights,
            }
        )
        return
    used = list((merge.coefficients or merge.weights).values())
    print_table(
        ["expert", "weight"], [[e.name, range_text(used, i)] for i, e in enumerate(merge.experts)], right=["weight"]
    )
    note(f"→ {request.output}, of kind {merge.experts[0].kind}; next: pimerge eval {request.output}", request.quiet)


def _refuse_other_options(request: Request, kind: str) -> None:
    given = {
        "--rank": request.rank != "max",
        "--energy": request.energy is not None,
        "--space": request.space != "core",
        "--into": request.into is not None,
        "--verify": request.verify,
    }
    problems = Problems()
    for option in [option for option, is_given in given.items() if is_given]:
        problems.add(f"{option} is for updates ΔW, and experts of kind {kind} have none", "leave it out")
    problems.raise_any(f"these experts of kind {kind} cannot be merged so")


def _print_plan(request: Request, merge: TensorMerge) -> None:
    experts = [
        {"name": e.name, "weight": weight_text(merge, i), "dtype": "/".join(e.dtypes), "sha256": e.sha256}
        for i, e in enumerate(merge.experts)
    ]
    document = {
        "output": str(request.output),
        "method": merge.method.name,
        "options": merge.method.options,
        "kind": merge.experts[0].kind,
        "experts": experts,
        "modules": len(merge.tensor_sets),
        "parameters": merge.experts[0].parameters,
    }
    if request.json:
        print_json(document)
        return
    print_table(
        ["expert", "weight", "dtype", "SHA-256"],
        [[e["name"], e["weight"], e["dtype"], e["sha256"][:12]] for e in experts],
        right=["weight"],
    )
    note(
        f"{merge.experts[0].parameters} numbers in {len(merge.tensor_sets)} modules by '{merge.method.name}', "
        "one by one; "
        "nothing is written now",
        request.quiet,
    )


def _documents(request: Request, merge: TensorMerge) -> Documents:
    from pimerge.adapters.writer import Documents
    from pimerge.core.manifest import Manifest, inputs_of, library_versions

    weights = {name: list(values) for name, values in (merge.coefficients or merge.weights).items()}
    options: dict[str, Any] = {
        "method": request.method,
        **merge.method.options,
        "weights": flat_weights(merge) or {name: list(values) for name, values in merge.weights.items()},
        "scales": [expert.strength for expert in merge.experts],
        "seed": request.seed,
        "include": list(request.include),
        "exclude": list(request.exclude),
        "head": request.head,
        "dtype": request.dtype or "the experts' own",
    }
    manifest = Manifest(
        command="merge",
        options=options,
        device="cpu",
        versions=library_versions(),
        inputs=inputs_of(merge.experts),
        outputs={},
        results={"parameters": merge.experts[0].parameters},
    )
    coefficients = coefficients_of(request, merge.experts, weights)
    return Documents(manifest, coefficients, _card(request, merge))


def _card(request: Request, merge: TensorMerge) -> str:
    from pimerge.adapters.model_card import card
    from pimerge.adapters.writer import base_reference

    first = merge.experts[0]
    base, _ = base_reference(first.base, request.output)
    known = "import pimerge.peft_methods  # pip install pimerge: PEFT has no such kind of its own\n" * (
        first.strategy.needs_import
    )
    return card(
        base,
        sources_of(merge),
        merge.method.name,
        method_summary(merge.method.name),
        {**merge.method.options, "seed": merge.method.seed},
        f"none; {first.parameters} numbers of kind {first.kind} were combined one by one.",
        f"""
{known}from peft import PeftModel
from transformers import AutoModel  # or the Auto class of your task

model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), "path/to/this/folder")
""",
        adapter=True,
        kind=first.kind,
    )
