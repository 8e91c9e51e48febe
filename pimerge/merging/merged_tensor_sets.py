"""Merge experts without ΔW entry by entry, and write the result as an expert of their kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pimerge.adapters.head import choose_head
from pimerge.adapters.model_class import loading_code
from pimerge.adapters.token_modules import tokenizer_folder
from pimerge.adapters.writer import Documents, base_reference, write_tensor_sets
from pimerge.merging.base_parameters import with_base_parameters
from pimerge.merging.choice import ChosenExperts
from pimerge.merging.merged import MergedExperts, Weights, flat, range_text, sources_of
from pimerge.merging.method import OpenedMethod
from pimerge.merging.preparation import statistics_of
from pimerge.merging.request import MergeRequest
from pimerge.merging.tensor_merge import TensorMerge, prepare_tensors

_IMPORT = "\nimport pimerge.peft_methods  # pip install pimerge: PEFT has no such kind of its own"


@dataclass
class MergedTensorSets(MergedExperts):
    """Merged experts without ΔW, which are written as an expert of their kind.

    Attributes:
        merge: the merge of the tensors.
    """

    merge: TensorMerge

    @property
    def plan(self) -> dict[str, Any]:
        """The JSON document of ``--dry-run``."""
        experts = [
            {
                "name": expert.name,
                "weight": range_text(self.merge.weights, place),
                "dtype": "/".join(expert.dtypes),
                "sha256": expert.sha256,
            }
            for place, expert in enumerate(self.merge.experts)
        ]
        first = self.merge.experts[0]
        return {
            **self._heading,
            "options": self.method.options,
            "kind": first.kind,
            "experts": experts,
            "modules": len(self.merge.tensor_sets),
            "parameters": first.parameters,
        }

    @property
    def weights(self) -> Weights:
        """Tensor set → the coefficient of each expert, or its weight if the method has no coefficients."""
        return self.merge.coefficients or self.merge.weights

    def _write(self) -> dict[str, Any]:
        first = self.merge.experts[0]
        written = write_tensor_sets(
            self.request.folder,
            self.merge.tensors,
            self.head,
            base=first.base,
            like=self.chosen.target or first,
            documents=self._documents,
            force=self.request.force,
        )
        return {
            **self._heading,
            "kind": first.kind,
            **written.manifest.results,
            "experts": [expert.name for expert in self.merge.experts],
            "weights": flat(self.merge.weights) or self.merge.weights,
        }

    def _documents(self) -> Documents:
        merge, first = self.merge, self.merge.experts[0]
        base, like = base_reference(first.base, self.request.folder)[0], self.chosen.target or first
        manifest = self._manifest(
            merge.experts,
            merge.weights,
            {"parameters": first.parameters},
            scales=[expert.strength for expert in merge.experts],
            dtype=self.request.dtype or "the experts' own",
        )
        card = self._card(
            base,
            sources_of(merge.experts, merge.weights),
            f"none; {first.parameters} parameters of kind {first.kind} were combined entry by entry.",
            _IMPORT * first.strategy.needs_import + loading_code(like.config, first.base, base, self.head),
            first.kind,
        )
        tokenizer = tokenizer_folder(self.chosen.experts, (), self.head)
        return Documents(manifest, self._coefficients(merge.experts, self.weights), card, tokenizer)


def merged_tensor_sets(request: MergeRequest, method: OpenedMethod, chosen: ChosenExperts) -> MergedTensorSets:
    """Check a merge of experts without ΔW."""
    first = chosen.experts[0]
    kind = first.kind
    problems = request.problems_for_updates_only(f"applies to updates ΔW, which experts of kind {kind} do not have")
    problems.raise_any(f"these experts of kind {kind} cannot be merged with these options")
    merge = prepare_tensors(
        chosen.experts,
        chosen.weights,
        method,
        dtype=request.torch_dtype(),
        selected=request.selects,
        **statistics_of(request.store, chosen.experts, method),
    )
    head = choose_head(request.head, chosen.experts, chosen.target)
    head = with_base_parameters(head, request.head, chosen, method, first.tensor_sets)
    return MergedTensorSets(request, method, chosen, head, merge)
