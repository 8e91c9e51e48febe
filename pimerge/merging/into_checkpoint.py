"""Merge adapters into a full checkpoint: open it, check it against the experts, and write the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pimerge.adapters.expert import Expert
from pimerge.adapters.head import Head
from pimerge.adapters.into_config import label_fields, model_class
from pimerge.adapters.keys import OF_TOKENS, TOKEN_ROWS, parameter_of
from pimerge.adapters.merge_into import MergedInto, MergeIntoPlan, merge_into, new_layouts
from pimerge.adapters.tensor_sets import BaseChange, Effect
from pimerge.adapters.token_modules import token_count
from pimerge.checkpoints.base import Base, find_base
from pimerge.checkpoints.checkpoint import Checkpoint, open_checkpoint, require_weights
from pimerge.checkpoints.tokenizer_files import copy_tokenizer
from pimerge.checkpoints.vocabularies import vocabulary_of
from pimerge.core.errors import PimergeError
from pimerge.core.files import hashes_of, json_text, new_folder, write_into
from pimerge.core.hf_loading import load_config
from pimerge.core.manifest import MANIFEST_FILE, Manifest
from pimerge.merging.checkpoint_check import check_checkpoint
from pimerge.merging.choice import ChosenExperts
from pimerge.merging.merged import FILE_LOADING, FOLDER_LOADING
from pimerge.merging.request import MergeRequest

_LOGITS_BIAS = "final_logits_bias"

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pimerge.adapters.lora_module import Factors


def open_into(request: MergeRequest, own: Base) -> Checkpoint:
    """Open the checkpoint ``request.into``, which must be the base of the experts."""
    assert request.into is not None
    path = request.into if request.into.exists() else find_base(str(request.into), None, Path.cwd()).folder
    if path is None:
        raise PimergeError(f"'{request.into}' is not on this machine", "download it first: hf download NAME")
    refuse_checkpoint(request.output, path)
    checkpoint = open_checkpoint(path)
    if request.dequantize:
        from pimerge.checkpoints.dequantised import dequantised

        checkpoint = dequantised(checkpoint)
    require_weights(checkpoint)
    if path.is_dir() and own.folder is not None and Base(str(path), None, path).identity != own.identity:
        raise PimergeError(
            f"'{path}' differs from the base of the experts, '{own.name}'",
            f"merge into '{own.source}'; if it is the same model, for example in another dtype, "
            f"also pass --base {path}",
        )
    return checkpoint


def refuse_checkpoint(output: Path | None, path: Path) -> None:
    """Refuse an output that is a checkpoint or contains it."""
    if output is not None and path.resolve().is_relative_to(output.resolve()):
        raise PimergeError(
            f"the output '{output}' is the checkpoint '{path}' or contains it", "choose another --output"
        )


def with_logits_bias(checkpoint: Checkpoint, head: Head) -> Head:
    """Add the bias of the logits that BART's relatives store, if the head has another vocabulary.

    As transformers resizes it: new tokens have 0.
    """
    rows = {
        len(tensor)
        for name, tensor in head.tensors.items()
        if name.endswith(".weight") and parameter_of(name).split(".")[-2] in OF_TOKENS
    }
    key = next((key for key in checkpoint.home if key.rpartition(".")[2] == _LOGITS_BIAS), None)
    if key is None or len(rows) != 1 or (bias := checkpoint.read(key)).shape[-1] == (count := rows.pop()):
        return head
    grown = bias.new_zeros(*bias.shape[:-1], count)
    common = min(count, bias.shape[-1])
    grown[..., :common] = bias[..., :common]
    return replace(head, tensors={**head.tensors, key: grown})


def head_arguments(checkpoint: Checkpoint, head: Head, chosen: ChosenExperts) -> dict[str, Any]:
    """The arguments of :func:`~pimerge.adapters.merge_into.plan_merge_into` that describe the head."""
    config = (chosen.target or chosen.experts[0]).config
    rows = head.token_rows
    return {
        "head": {name: tensor for name, tensor in head.tensors.items() if name not in rows},
        "changes": [
            BaseChange(
                f"{name.removesuffix(TOKEN_ROWS)}.weight",
                name,
                tuple(head.tensors[name].shape),
                Effect.ROWS_REPLACED,
                rows=tokens,
            )
            for name, tokens in rows.items()
        ],
        "modules_to_save": head.modules,
        "fields": _fields(checkpoint, head),
        "trained_in": model_class(checkpoint, config) if head.tensors else None,
    }


def _fields(checkpoint: Checkpoint, head: Head) -> dict[str, Any]:
    """Return the fields of config.json that describe a head: its labels, and the model class."""
    if head.task is None or not head.tensors or checkpoint.is_file:
        return {}
    import transformers

    try:
        config = load_config(checkpoint.path)
        model = getattr(transformers, head.task.type.auto_model_for(config))._model_mapping[type(config)]
    except (OSError, ValueError, KeyError) as error:
        raise PimergeError(
            f"the config of '{checkpoint.path}' is for no model that transformers can give a head: {error}",
            "use another checkpoint, or pass --head none",
        ) from error
    return {**label_fields(head.task.labels), "architectures": [model.__name__]}


def handled_by(plan: MergeIntoPlan) -> list[str]:
    """Sentences on what a merge changes in the checkpoint beside its weights."""
    found = []
    if plan.checkpoint.is_view:
        found.append(
            f"the weights of '{plan.checkpoint.name}' are dequantised, and written without quantisation: a part of "
            "what was lost when they were quantised stays lost"
        )
    if plan.untied:
        ties = plan.config is None or plan.config.get("tie_word_embeddings") is not False
        found.append(
            "the adapter changes one of two tied weights: both are written, and "
            + (
                "transformers (from version 5) does not tie tensors that differ"
                if ties
                else "config.json no longer ties them"
            )
        )
    if plan.resized:
        before = vocabulary_of(plan.checkpoint.config)
        found.append(
            f"the vocabulary has {plan.resized} tokens, not {before} as in the base: config.json says so, and the "
            "adapter's tokenizer is written if its folder has one"
        )
    if plan.heads:
        found.append(f"the head is written as {', '.join(sorted(plan.heads))}")
    return found


def write_merged(
    request: MergeRequest,
    plan: MergeIntoPlan,
    update: Callable[[str], Factors],
    head: Head,
    chosen: ChosenExperts,
    documents: Callable[[MergedInto], tuple[Mapping[str, str], Manifest]],
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> MergedInto:
    """Write the checkpoint and its documents, completely or not at all.

    Args:
        update: module → its merged factors.
        documents: gives the files beside the weights and the manifest, once the weights are written.
        tensors: key in the adapter → merged tensor, for experts without ΔW.
    """
    checkpoint, dtype = plan.checkpoint, request.torch_dtype()
    with new_folder(request.folder, force=request.force) as partial:
        output = partial / checkpoint.name if checkpoint.is_file else partial
        written = merge_into(
            plan,
            update,
            output,
            head=head.tensors,
            tensors={**head.tensors, **(tensors or {})},
            dtype=dtype,
            track=request.track,
        )
        new = new_layouts(checkpoint, plan.copies, plan.heads, head.tensors)
        check_checkpoint(output, checkpoint, {key: shape for key, (_, shape) in new.items()})
        if plan.resized and (source := _source_of(plan.resized, chosen)):
            copy_tokenizer(source.path, partial)
        contents, manifest = documents(written)
        write_into(partial, dict(contents))
        manifest = manifest.model_copy(update={"outputs": hashes_of(partial)})
        write_into(partial, {MANIFEST_FILE: json_text(manifest.model_dump())})
    return written


def _source_of(tokens: int, chosen: ChosenExperts) -> Expert | None:
    """Return the expert whose tokenizer fits a vocabulary: the target, or the first one with this number of tokens."""
    experts = [*([chosen.target] if chosen.target else []), *chosen.experts]
    return next((expert for expert in experts if token_count(expert) == tokens), None)


def sha256_of(checkpoint: Checkpoint, own: Base) -> str:
    """The hash of the checkpoint, which is already known if it is the base of the experts."""
    if own.folder is not None and own.folder.resolve() == checkpoint.path.resolve():
        return own.identity.removeprefix("sha256:")
    return checkpoint.sha256


def loading(checkpoint: Checkpoint) -> str:
    """Python code for the card that loads the result."""
    path = json.dumps(f"path/to/this/folder/{checkpoint.name}")
    return FILE_LOADING.format(path) if checkpoint.is_file else FOLDER_LOADING


def wide(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of merged tensors before they are added: at least float32, so that the weights are rounded once."""
    import torch

    return torch.float32 if dtype is None else torch.promote_types(dtype, torch.float32)
