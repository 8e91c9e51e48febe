"""Merge updates ΔW into a full checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from pimerge.adapters.expert import Expert
from pimerge.adapters.head import Head
from pimerge.adapters.into_config import label_fields, model_class, vocabulary_of
from pimerge.adapters.lora_module import Factors
from pimerge.adapters.merge_into import MergeIntoPlan, merge_into, plan_merge_into
from pimerge.adapters.merged_module import Summary, relative_error
from pimerge.adapters.writer import COEFFICIENTS_FILE
from pimerge.checkpoints.base import Base, find_base
from pimerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pimerge.checkpoints.tokenizer_files import copy_tokenizer
from pimerge.core.errors import PimergeError
from pimerge.core.files import hashes_of, json_text, new_folder, write_into
from pimerge.core.manifest import MANIFEST_FILE
from pimerge.merging.choice import ChosenExperts
from pimerge.merging.dry_run import UpdatePlan
from pimerge.merging.merged import FILE_LOADING, FOLDER_LOADING, sources_of
from pimerge.merging.merged_updates import MergedUpdates, merged_updates
from pimerge.merging.method import OpenedMethod
from pimerge.merging.request import MergeRequest


@dataclass
class MergedIntoCheckpoint(MergedUpdates):
    """Merged updates ΔW, which are added to the weights of a full checkpoint.

    Attributes:
        into: the changes to the checkpoint.
        size: size of the written checkpoint in bytes; 0 before it is saved.
    """

    is_adapter: ClassVar[bool] = False
    into: MergeIntoPlan
    size: int = field(default=0, init=False)

    def update_plan(self) -> UpdatePlan:
        """Describe the merge, including the changes to the checkpoint."""
        plan, handled = super().update_plan(), []
        if self.into.untied:
            handled.append(
                "the adapter changes one of two tied weights: both are written, and config.json no longer ties them"
            )
        if self.into.resized:
            before = vocabulary_of(self.into.checkpoint.config)
            handled.append(
                f"the vocabulary has {self.into.resized} tokens, not {before} as in the base: config.json says so, "
                "and the adapter's tokenizer is written if its folder has one"
            )
        if self.into.heads:
            handled.append(f"the head is written as {', '.join(sorted(self.into.heads))}")
        return replace(plan, handled=[*plan.handled, *handled], size=self.into.checkpoint.size)

    def refuse_over_inputs(self) -> None:
        """Refuse an output that is an input of the merge or contains one."""
        super().refuse_over_inputs()
        refuse_checkpoint(self.request.output, self.into.checkpoint.path)

    def _write(self) -> dict[str, Any]:
        request, checkpoint = self.request, self.into.checkpoint
        summaries: dict[str, Summary] = {}

        def update(name: str) -> Factors:
            merged = self.merge.module(name)
            summaries[name] = merged.summary
            return merged.factors

        with new_folder(request.folder, force=request.force) as partial:
            written = merge_into(
                self.into,
                update,
                partial / checkpoint.name if checkpoint.is_file else partial,
                head=self.head.tensors,
                dtype=request.torch_dtype(),
                track=request.track,
            )
            if self.into.resized and (source := self._source_of_head()):
                copy_tokenizer(source.path, partial)
            self.summaries = [summaries[name] for name in self.merge.names]
            coefficients = self._coefficients(self.merge.experts, self.weights)
            contents = {COEFFICIENTS_FILE: json_text(coefficients.model_dump()), "README.md": self._checkpoint_card()}
            write_into(partial, contents)
            manifest = self._manifest_of_updates(into=checkpoint.name, into_sha256=self._checkpoint_sha256())
            manifest = manifest.model_copy(update={"outputs": hashes_of(partial)})
            write_into(partial, {MANIFEST_FILE: json_text(manifest.model_dump())})
        self.size = written.size
        return {**self._heading, "folded": written.modules, "truncation": relative_error(self.summaries)}

    def _source_of_head(self) -> Expert | None:
        """Return the expert whose head is written: the target, or the first one with these shapes."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.head.tensors.items()}
        for expert in [*([self.chosen.target] if self.chosen.target else []), *self.chosen.experts]:
            if shapes == {name: expert.file.entries[key].shape for name, key in expert.head.items()}:
                return expert
        return None

    def _checkpoint_sha256(self) -> str:
        """Return the hash of the checkpoint, which is already known if it is the base of the experts."""
        checkpoint, own = self.into.checkpoint, self.merge.experts[0].base
        if own.folder is not None and own.folder.resolve() == checkpoint.path.resolve():
            return own.identity.removeprefix("sha256:")
        return checkpoint.sha256

    def _checkpoint_card(self) -> str:
        checkpoint = self.into.checkpoint
        return self._card(
            checkpoint.name,
            sources_of(self.merge.experts, self.merge.weights),
            "the update is part of the full weights.",
            FILE_LOADING.format(checkpoint.name) if checkpoint.is_file else FOLDER_LOADING,
            space=self.merge.space,
            rank=self.request.rank,
        )


def merged_into(request: MergeRequest, method: OpenedMethod, chosen: ChosenExperts) -> MergedIntoCheckpoint:
    """Check a merge of updates into the checkpoint ``request.into``."""
    assert request.into is not None
    merged = merged_updates(request, method, chosen)
    merge, head = merged.merge, merged.head
    path = request.into if request.into.exists() else find_base(str(request.into), None, Path.cwd()).folder
    if path is None:
        raise PimergeError(f"'{request.into}' is not on this machine", "download it first: hf download NAME")
    refuse_checkpoint(request.output, path)
    checkpoint, own = open_checkpoint(path), merge.experts[0].base
    if path.is_dir() and own.folder is not None and Base(str(path), None, path).identity != own.identity:
        raise PimergeError(
            f"'{path}' differs from the base of the experts, '{own.name}'",
            f"merge into '{own.source}'; if it is the same model, for example in another dtype, "
            f"also pass --base {path}",
        )
    plan = plan_merge_into(
        checkpoint,
        {name: merge.layout(name) for name in merge.names},
        fan_in_fan_out=any(bool(expert.config.get("fan_in_fan_out")) for expert in merge.experts),
        head=head.tensors,
        fields=_head_fields(checkpoint, head),
        trained_in=model_class(checkpoint, (chosen.target or merge.experts[0]).config) if head.tensors else None,
    )
    # at least float32, so that the update is rounded only once, with the weights of the checkpoint
    wide = replace(merge, dtype=torch.promote_types(merge.dtype, torch.float32))
    return MergedIntoCheckpoint(request, method, chosen, head, wide, plan)


def refuse_checkpoint(output: Path | None, path: Path) -> None:
    """Refuse an output that is a checkpoint or contains it."""
    if output is not None and path.resolve().is_relative_to(output.resolve()):
        raise PimergeError(
            f"the output '{output}' is the checkpoint '{path}' or contains it", "choose another --output"
        )


def _head_fields(checkpoint: Checkpoint, head: Head) -> dict[str, Any]:
    """Return the fields of config.json that describe a head: its labels, and the model class."""
    if head.task is None or not head.tensors or checkpoint.is_file:
        return {}
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.path)
    model = getattr(transformers, head.task.type.auto_model_for(config))._model_mapping[type(config)]
    return {**label_fields(head.task.labels), "architectures": [model.__name__]}
