"""``pimerge merge --into``: the merged update folded into a full checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pimerge.cli.console import note, print_json, print_table, size_text, tracker
from pimerge.cli.merge.request import Request
from pimerge.cli.merge.show import coefficients_of, manifest_of, method_summary, print_plan, sources_of, weights_of
from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    from pimerge.adapters.lora_module import Factors
    from pimerge.adapters.low_rank import Summary
    from pimerge.adapters.merge_into import MergeIntoPlan
    from pimerge.adapters.writer import Head
    from pimerge.checkpoints.checkpoint import Checkpoint
    from pimerge.merging.dry_run import Plan
    from pimerge.merging.merge import Merge


def merge_into_base(request: Request, merge: Merge, head: Head, plan: Plan, deviation: float | None) -> None:
    """Write the checkpoint of ``--into`` with the merge in its weights."""
    import torch

    from pimerge.adapters.merge_into import fold, plan_merge_into
    from pimerge.adapters.writer import COEFFICIENTS_FILE
    from pimerge.core.files import hashes_of, json_text, new_folder, write_into
    from pimerge.core.manifest import MANIFEST_FILE

    checkpoint = _open(request, merge)
    # the checkpoint's weights are rounded once, and the update not before
    merge = replace(merge, dtype=torch.promote_types(merge.dtype, torch.float32))
    folding = plan_merge_into(
        checkpoint,
        {name: merge.layout(name) for name in merge.names},
        fan_in_fan_out=any(bool(expert.config.get("fan_in_fan_out")) for expert in merge.experts),
        head=head.tensors,
        fields=_head_fields(checkpoint, head),
    )
    if request.dry_run:
        handled = [*plan.handled, *_changes(folding)]
        print_plan(request, merge, replace(plan, handled=handled, size=checkpoint.size))
        return
    for sentence in _changes(folding):
        note(sentence, request.quiet)
    summaries: dict[str, Summary] = {}

    def update(name: str) -> Factors:
        merged = merge.module(name)
        summaries[name] = merged.summary
        return merged.factors

    with new_folder(request.output, force=request.force) as partial:
        written = fold(
            folding,
            update,
            partial / checkpoint.name if checkpoint.is_file else partial,
            head=head.tensors,
            dtype=request.torch_dtype(),
            track=tracker(request.quiet),
        )
        found = [summaries[name] for name in merge.names]
        coefficients = coefficients_of(request, merge.experts, weights_of(merge, found))
        manifest = manifest_of(request, merge, found, deviation)
        contents = {
            COEFFICIENTS_FILE: json_text(coefficients.model_dump()),
            "README.md": _card(request, merge, checkpoint),
        }
        write_into(partial, contents)
        outputs = hashes_of(partial)
        options = {**manifest.options, "into": checkpoint.name, "into_sha256": _sha256(checkpoint, merge)}
        manifest = manifest.model_copy(update={"outputs": outputs, "options": options})
        write_into(partial, {MANIFEST_FILE: json_text(manifest.model_dump())})
    _report(request, found, written.modules, written.size)


def _open(request: Request, merge: Merge) -> Checkpoint:
    """The checkpoint of ``--into``, checked to be the experts' base."""
    from pimerge.checkpoints.base import Base, find_base
    from pimerge.checkpoints.checkpoint import open_checkpoint

    assert request.into is not None
    path: Path | None = request.into
    if path is not None and not path.exists():
        path = find_base(str(request.into), None, Path.cwd()).folder
    if path is None:
        raise PimergeError(f"'{request.into}' is not on this machine", "download it first: hf download NAME")
    if path.resolve().is_relative_to(request.output.resolve()):
        raise PimergeError(
            f"the output '{request.output}' is the checkpoint '{path}' or holds it", "choose another --output"
        )
    checkpoint = open_checkpoint(path)
    own = merge.experts[0].base
    if path.is_dir() and own.folder is not None and Base(str(path), None, path).identity != own.identity:
        raise PimergeError(
            f"'{path}' is another model than the experts' base '{own.name}'",
            f"fold into '{own.source}', or, if it is the same model (in another dtype, say), pass --base {path}, too",
        )
    return checkpoint


def _sha256(checkpoint: Checkpoint, merge: Merge) -> str:
    """Of the checkpoint; it is known already where it is the experts' own base."""
    own = merge.experts[0].base
    if own.folder is not None and own.folder.resolve() == checkpoint.path.resolve():
        return own.identity.removeprefix("sha256:")
    return checkpoint.sha256


def _head_fields(checkpoint: Checkpoint, head: Head) -> dict[str, Any]:
    """What config.json has to say of a head: its labels, and the class that has one."""
    from pimerge.adapters.merge_into import label_fields

    if head.task is None or not head.tensors or checkpoint.is_file:
        return {}
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.path)
    model = getattr(transformers, head.task.type.auto_model_for(config))._model_mapping[type(config)]
    return {**label_fields(head.task.labels), "architectures": [model.__name__]}


def _changes(plan: MergeIntoPlan) -> list[str]:
    found = []
    if plan.untied:
        found.append(
            "the adapter changes one of two weights that were tied: they are written apart, and config.json says so"
        )
    if plan.heads:
        found.append(f"the head goes in as {', '.join(sorted(plan.heads))}")
    return found


def _report(request: Request, summaries: Sequence[Summary], modules: int, size: int) -> None:
    from pimerge.adapters.low_rank import relative_error

    error = relative_error(summaries)
    if request.json:
        print_json({"output": str(request.output), "method": request.method, "folded": modules, "truncation": error})
        return
    print_table(["folded", "of", "error"], [[str(modules), size_text(size), f"{error:.2%}"]], right=["folded", "error"])
    note(f"→ {request.output}: a full checkpoint", request.quiet)


def _card(request: Request, merge: Merge, checkpoint: Checkpoint) -> str:
    from pimerge.adapters.model_card import card

    loading = (
        f'from safetensors.torch import load_file\n\ntensors = load_file("path/to/this/folder/{checkpoint.name}")'
        if checkpoint.is_file
        else "from transformers import AutoModel  # or the Auto class of your task\n\n"
        'model = AutoModel.from_pretrained("path/to/this/folder")'
    )
    return card(
        checkpoint.name,
        sources_of(merge),
        merge.method.name,
        method_summary(merge.method.name),
        {**merge.method.options, "space": merge.space, "seed": merge.method.seed, "rank": request.rank},
        "the update is part of the full weights.",
        loading,
        adapter=False,
    )
