"""Train the whole base without any expert: the control "full fine-tuning".

The result is a checkpoint as large as the base. ``pimerge eval`` scores it like an expert, but it cannot join a pool.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pimerge.tuning.method import Granularity, MixturePlan, TuneMethod

if TYPE_CHECKING:
    from pimerge.core.manifest import Manifest
    from pimerge.tuning.session import TuneRequest, TuneResult


def fit(request: TuneRequest) -> TuneResult:
    """Train the base; the request's ``undo`` restores it."""
    import torch

    from pimerge.models.injection import tensors_restored
    from pimerge.tuning.mixture import Mixture
    from pimerge.tuning.session import TuneResult, write_with_manifest
    from pimerge.tuning.trainer import train

    session, loaded = request.session, request.session.loaded
    kept, held_out = request.examples()
    dtypes = {name: parameter.dtype for name, parameter in loaded.model.named_parameters()}
    request.undo.enter_context(tensors_restored(loaded.model.parameters()))
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)
    mixture = Mixture([], [0.0], Granularity.GLOBAL, trained=False).to(session.device)
    outcome = train(request, loaded.model, mixture, kept, held_out)

    def write(output: Path, manifest: Manifest, force: bool) -> None:
        from pimerge.core.files import new_folder
        from pimerge.merging.checkpoint_check import check_trained

        with new_folder(output, force=force) as partial:
            for name, parameter in loaded.model.named_parameters():
                parameter.data = parameter.data.to(dtypes[name])
            loaded.model.save_pretrained(partial)  # type: ignore[operator]
            loaded.processor.save_pretrained(partial)
            check_trained(partial)
            write_with_manifest(partial, {}, session.task.document_for(output), manifest)

    return TuneResult(
        model=loaded.model,
        outcome=outcome,
        examples=len(kept),
        held_out=len(held_out) if held_out else 0,
        deployed_parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        write=write,
    )


METHOD = TuneMethod(
    name="full",
    summary="Train the whole base without any expert: the control 'full fine-tuning'.",
    formula="θ = θ_base + Δθ, all of it trained",
    plan=MixturePlan(full=True),
    fit=fit,
    control=True,
)
