"""All of the base trained, no expert: the control "full fine-tuning". The result is a checkpoint, as large as the base.

``pimerge eval`` scores it as it scores an expert; it cannot join a pool.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pimerge.tuning.methods import MixturePlan

if TYPE_CHECKING:
    from pimerge.core.manifest import Manifest
    from pimerge.tuning.session import TuneRequest, TuneResult

PLAN = MixturePlan(full=True)


def fit(request: TuneRequest) -> TuneResult:
    """Train the base; it comes back as it was with the request's ``undo``."""
    import torch

    from pimerge.models.injection import tensors_restored
    from pimerge.tuning.lora_layers import Mixture
    from pimerge.tuning.session import TuneResult
    from pimerge.tuning.trainer import train

    loaded = request.session.loaded
    kept, held_out = request.examples()
    dtypes = {name: parameter.dtype for name, parameter in loaded.model.named_parameters()}
    request.undo.enter_context(tensors_restored(loaded.model.parameters()))
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)
    mixture = Mixture([], [0.0], "global", trained=False).to(request.session.device)
    outcome = train(
        loaded,
        mixture,
        kept,
        held_out,
        request.run,
        request.options,
        request.session.precision,
        track=request.track,
        note=request.note,
    )

    def write(output: Path, manifest: Manifest, force: bool) -> None:
        from pimerge.adapters.expert import TASK
        from pimerge.core.files import json_text, new_folder, sha256_file, write_into
        from pimerge.core.manifest import MANIFEST_FILE

        with new_folder(output, force=force) as partial:
            for name, parameter in loaded.model.named_parameters():
                parameter.data = parameter.data.to(dtypes[name])
            loaded.model.save_pretrained(partial)  # type: ignore[operator]
            loaded.processor.save_pretrained(partial)
            write_into(partial, {TASK: json_text(request.session.task.document_for(output))})
            outputs = {file.name: sha256_file(file) for file in sorted(partial.iterdir()) if file.is_file()}
            write_into(
                partial, {MANIFEST_FILE: json_text(manifest.model_copy(update={"outputs": outputs}).model_dump())}
            )

    size = sum(parameter.numel() for parameter in loaded.model.parameters())
    return TuneResult(
        model=loaded.model,
        outcome=outcome,
        experts=[],
        weights={},
        scales=[],
        examples=len(kept),
        held_out=len(held_out) if held_out else 0,
        rank=0,
        truncation=0.0,
        deployed_parameters=size,
        settings={},
        write=write,
    )
