"""Merge experts without ΔW into a full checkpoint, whose weights they scale or replace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from pimerge.adapters.lora_module import Factors
from pimerge.adapters.merge_into import MergedInto, MergeIntoPlan, plan_merge_into
from pimerge.adapters.model_card import CARD_FILE
from pimerge.adapters.writer import COEFFICIENTS_FILE
from pimerge.core.errors import PimergeError
from pimerge.core.files import json_text
from pimerge.core.manifest import Manifest
from pimerge.merging.choice import ChosenExperts
from pimerge.merging.into_checkpoint import (
    handled_by,
    head_arguments,
    loading,
    open_into,
    refuse_checkpoint,
    sha256_of,
    wide,
    with_logits_bias,
    write_merged,
)
from pimerge.merging.merged import sources_of
from pimerge.merging.merged_tensor_sets import MergedTensorSets, merged_tensor_sets
from pimerge.merging.method import OpenedMethod
from pimerge.merging.request import MergeRequest


@dataclass
class MergedTensorsInto(MergedTensorSets):
    """Merged experts without ΔW, which change the weights of a full checkpoint.

    Attributes:
        into: the changes to the checkpoint.
        size: size of the written checkpoint in bytes; 0 before it is saved.
    """

    is_adapter: ClassVar[bool] = False
    into: MergeIntoPlan
    size: int = field(default=0, init=False)

    @property
    def plan(self) -> dict[str, Any]:
        """The JSON document of ``--dry-run``."""
        return {**super().plan, "handled": handled_by(self.into), "size": self.into.checkpoint.size}

    def check(self) -> None:
        """Report special cases."""
        for sentence in handled_by(self.into):
            self.request.note(sentence)

    def refuse_over_inputs(self) -> None:
        """Refuse an output that is an input of the merge or contains one."""
        super().refuse_over_inputs()
        refuse_checkpoint(self.request.output, self.into.checkpoint.path)

    @property
    def _decisive(self) -> dict[str, Any]:
        return {**super()._decisive, "into": sha256_of(self.into.checkpoint, self.merge.experts[0].base)}

    def _write(self) -> dict[str, Any]:
        checkpoint, merge, first = self.into.checkpoint, self.merge, self.merge.experts[0]
        tensors = merge.tensors()

        def update(name: str) -> Factors:
            raise AssertionError(f"{name} has no ΔW")

        def documents(written: MergedInto) -> tuple[Mapping[str, str], Manifest]:
            coefficients = self._coefficients(merge.experts, self.weights)
            card = self._card(
                checkpoint.name,
                sources_of(merge.experts, merge.weights),
                f"none; {first.parameters} parameters of kind {first.kind} were combined entry by entry, and the full "
                "weights hold the result.",
                loading(checkpoint),
            )
            manifest = self._manifest(
                merge.experts,
                merge.weights,
                {"parameters": first.parameters},
                scales=[expert.strength for expert in merge.experts],
                dtype=self.request.dtype or "the checkpoint's own",
                into=checkpoint.name,
                into_sha256=sha256_of(checkpoint, first.base),
            )
            return {COEFFICIENTS_FILE: json_text(coefficients.model_dump()), CARD_FILE: card}, manifest

        written = write_merged(self.request, self.into, update, self.head, self.chosen, documents, tensors=tensors)
        self.size = written.size
        return {**self._heading, "kind": first.kind, "folded": written.modules, "truncation": 0.0}


def merged_tensors_into(request: MergeRequest, method: OpenedMethod, chosen: ChosenExperts) -> MergedTensorsInto:
    """Check a merge of experts without ΔW into the checkpoint ``request.into``."""
    first = chosen.experts[0]
    changes_of = first.strategy.base_changes
    if changes_of is None:
        raise PimergeError(
            f"experts of kind {first.kind} cannot be merged into a checkpoint: {first.strategy.why_not_into}",
            "leave out --into: the result is then an adapter of this kind",
        )
    merged = merged_tensor_sets(request, method, chosen)
    checkpoint = open_into(request, first.base)
    head = with_logits_bias(checkpoint, merged.head)
    plan = plan_merge_into(
        checkpoint,
        {},
        fan_in_fan_out=bool(first.config.get("fan_in_fan_out")),
        **{
            **head_arguments(checkpoint, head, chosen),
            "changes": [each for group in first.tensor_sets.values() for each in changes_of(group, first.config)],
        },
    )
    merge = replace(merged.merge, dtype=wide(request.torch_dtype()))
    return MergedTensorsInto(request, method, chosen, head, merge, plan)
