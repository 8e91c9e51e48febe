"""The mean of the probabilities of the chosen experts and the bare base, each with its own head.

    p(y|x) = 1/(N + 1) · (p_0(y|x) + Σ_n p_n(y|x))

Experts are frozen, and the N + 1 heads share the epochs. The result is N + 1 experts in one folder with
``ensemble.json``, and costs N + 1 forward passes; ``distill`` turns it into one expert.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pimerge.tuning.method import TuneMethod
from pimerge.tuning.methods._expert_heads import PLAN, equal_weights, train_heads

if TYPE_CHECKING:
    from pimerge.core.manifest import Manifest
    from pimerge.tuning.session import TuneRequest, TuneResult

BASE = "(base)"


def fit(request: TuneRequest) -> TuneResult:
    """Train the heads."""
    from pimerge.adapters.merged_module import relative_error
    from pimerge.adapters.writer import Documents
    from pimerge.tuning.session import TuneResult, write_with_manifest

    trained = train_heads(request, METHOD, equal_weights)
    mixed, model = trained.mixed, trained.model
    parts = []
    for expert, head in model.heads:
        model.switch.choose(expert)
        parts.append((mixed.collapse(1 if expert is None else request.options.rank), mixed.head(head)))
    names = [BASE if expert is None else mixed.names[expert] for expert, _ in model.heads]

    def write(output: Path, manifest: Manifest, force: bool) -> None:
        from pimerge.adapters.expert import open_expert
        from pimerge.core.files import json_text, new_folder
        from pimerge.tuning.ensemble import ENSEMBLE_FILE, EnsembleDocument, EnsembleExpert

        with new_folder(output, force=force) as partial:
            experts = []
            for number, ((part, head), name, weight) in enumerate(zip(parts, names, model.weights, strict=True)):
                folder = f"{number}-{name.strip('()')}"
                part.write(partial / folder, head, Documents(manifest), False)
                sha256 = open_expert(partial / folder, request.session.base.reference).sha256
                experts.append(EnsembleExpert(path=folder, sha256=sha256, weight=weight))
            document = json_text(EnsembleDocument(members=experts).model_dump())
            write_with_manifest(partial, {ENSEMBLE_FILE: document}, request.session.task.document_for(output), manifest)

    return TuneResult(
        model=model,
        outcome=trained.outcome,
        experts=names,
        weights={"probabilities": list(model.weights)},
        scales=[1.0 if expert is None else mixed.chosen[expert].strength for expert, _ in model.heads],
        examples=len(trained.kept),
        held_out=len(trained.held_out) if trained.held_out else 0,
        rank=max(part.rank for part, _ in parts),
        truncation=relative_error([summary for part, _ in parts for summary in part.summaries]),
        deployed_parameters=sum(part.size + sum(t.numel() for t in head.tensors.values()) for part, head in parts),
        settings={"scales": [expert.strength for expert in mixed.chosen]},
        write=write,
    )


METHOD = TuneMethod(
    name="ensemble",
    summary="Average the probabilities of the chosen experts and the bare base, each with its own head.",
    formula="p(y|x) = 1/(N + 1) · (p_0(y|x) + Σ_n p_n(y|x))",
    plan=PLAN,
    fit=fit,
)
