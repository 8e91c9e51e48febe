"""Merge updates ΔW into a full checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from pimerge.adapters.compatibility import refuse_copied_layers
from pimerge.adapters.lora_module import Factors
from pimerge.adapters.merge_into import MergedInto, MergeIntoPlan, plan_merge_into
from pimerge.adapters.merged_module import Summary, relative_error
from pimerge.adapters.model_card import CARD_FILE
from pimerge.adapters.writer import COEFFICIENTS_FILE
from pimerge.core.files import json_text
from pimerge.core.manifest import Manifest
from pimerge.merging.choice import ChosenExperts
from pimerge.merging.dry_run import UpdatePlan
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
        plan = super().update_plan()
        return replace(plan, handled=[*plan.handled, *handled_by(self.into)], size=self.into.checkpoint.size)

    def refuse_over_inputs(self) -> None:
        """Refuse an output that is an input of the merge or contains one."""
        super().refuse_over_inputs()
        refuse_checkpoint(self.request.output, self.into.checkpoint.path)

    @property
    def _decisive(self) -> dict[str, Any]:
        return {**super()._decisive, "into": sha256_of(self.into.checkpoint, self.merge.experts[0].base)}

    def _write(self) -> dict[str, Any]:
        summaries: dict[str, Summary] = {}

        def update(name: str) -> Factors:
            merged = self.merge.module(name)
            summaries[name] = merged.summary
            return merged.factors

        def documents(written: MergedInto) -> tuple[Mapping[str, str], Manifest]:
            self.summaries = [summaries[name] for name in self.merge.names]
            coefficients = self._coefficients(self.merge.experts, self.weights)
            contents = {COEFFICIENTS_FILE: json_text(coefficients.model_dump()), CARD_FILE: self._checkpoint_card()}
            checkpoint = self.into.checkpoint
            sha256 = sha256_of(checkpoint, self.merge.experts[0].base)
            return contents, self._manifest_of_updates(into=checkpoint.name, into_sha256=sha256)

        written = write_merged(self.request, self.into, update, self.head, self.chosen, documents)
        self.size = written.size
        return {**self._heading, "folded": written.modules, "truncation": relative_error(self.summaries)}

    def _checkpoint_card(self) -> str:
        checkpoint = self.into.checkpoint
        return self._card(
            checkpoint.name,
            sources_of(self.merge.experts, self.merge.weights),
            "the update is part of the full weights.",
            loading(checkpoint),
            space=self.merge.space,
            rank=self.request.rank,
        )


def merged_into(request: MergeRequest, method: OpenedMethod, chosen: ChosenExperts) -> MergedIntoCheckpoint:
    """Check a merge of updates into the checkpoint ``request.into``."""
    refuse_copied_layers(chosen.experts)
    merged = merged_updates(request, method, chosen)
    merge = merged.merge
    checkpoint = open_into(request, merge.experts[0].base)
    head = with_logits_bias(checkpoint, merged.head)
    plan = plan_merge_into(
        checkpoint,
        {name: merge.layout(name) for name in merge.names},
        fan_in_fan_out=any(bool(expert.config.get("fan_in_fan_out")) for expert in merge.experts),
        **head_arguments(checkpoint, head, chosen),
    )
    return MergedIntoCheckpoint(request, method, chosen, head, replace(merge, dtype=wide(merge.dtype)), plan)
