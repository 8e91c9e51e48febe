"""Merge updates ΔW, and write the result as a LoRA adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pimerge.adapters.base_weights import maybe_grouped
from pimerge.adapters.hadamard import fits_hadamard
from pimerge.adapters.head import choose_head, refuse_updates_of_head
from pimerge.adapters.merged_module import MergedModule, Summary, relative_error, rounding_error
from pimerge.adapters.model_class import loading_code
from pimerge.adapters.token_modules import tokenizer_folder
from pimerge.adapters.writer import Documents, Layout, base_reference, write_expert
from pimerge.core.errors import PimergeError
from pimerge.core.manifest import Manifest
from pimerge.merging.base_parameters import with_base_parameters
from pimerge.merging.choice import ChosenExperts
from pimerge.merging.dry_run import UpdatePlan, plan_of
from pimerge.merging.merged import MergedExperts, flat, range_text, sources_of
from pimerge.merging.method import OpenedMethod
from pimerge.merging.preparation import prepare, reader_of, statistics_of
from pimerge.merging.request import MergeRequest
from pimerge.merging.self_check import verify
from pimerge.merging.update_merge import UpdateMerge, UpdateSettings


@dataclass
class MergedUpdates(MergedExperts):
    """Merged updates ΔW, which are written as a LoRA adapter.

    Attributes:
        merge: the merge of the modules.
        deviation: the largest deviation in the self-check; None if there was none.
        as_hadamard: whether the result is a LoHa; see :mod:`pimerge.adapters.hadamard`.
        summaries: rank and truncation error of each module; empty before the merge is saved.
    """

    merge: UpdateMerge
    as_hadamard: bool = field(default=False, kw_only=True)
    deviation: float | None = field(default=None, init=False)
    summaries: list[Summary] = field(default_factory=list, init=False)

    def update_plan(self) -> UpdatePlan:
        """Describe the merge."""
        plan = plan_of(self.merge, self.chosen.experts, self.head)
        remarks = dict.fromkeys((self.chosen.vocabulary, *self.head.remarks))  # a vocabulary is described once
        return replace(plan, handled=[*plan.handled, *filter(None, remarks)])

    @property
    def plan(self) -> dict[str, Any]:
        """The JSON document of ``--dry-run``."""
        experts = [
            {
                "name": expert.name,
                "weight": range_text(self.merge.weights, place),
                "scale": expert.strength,
                "rank": "/".join(map(str, expert.ranks)),
                "dtype": "/".join(expert.dtypes),
                "sha256": expert.sha256,
            }
            for place, expert in enumerate(self.merge.experts)
        ]
        return {
            **self._heading,
            "options": self.method.options,
            "experts": experts,
            **asdict(self.update_plan()),
            "dtype": self._dtype,
        }

    @property
    def _dtype(self) -> str:
        """The name of the result's dtype."""
        return str(self.merge.dtype).removeprefix("torch.")

    def check(self) -> None:
        """Report special cases and parts that are left out, and run the self-check if requested."""
        plan, request = self.update_plan(), self.request
        for sentence in [*plan.handled, *(f"left out: {what}" for what in plan.left_out)]:
            request.note(sentence)
        if self.as_hadamard:
            request.note("the result is a LoHa: PEFT's LoRA cannot update convolutions that may be divided into groups")
        if request.verify:
            verified = verify(self.merge, track=request.track)
            self.deviation = verified.deviation
            request.note(
                f"verified with '{verified.method}': every expert comes back to within {verified.deviation:.1e}"
            )

    @property
    def weights(self) -> dict[str, list[float]]:
        """Module → the coefficient of each update, or its weight if the method has no coefficients."""
        return {s.name: list(s.coefficients or self.merge.weights[s.name]) for s in self.summaries}

    @property
    def _like(self) -> dict[str, Any]:
        """The config that the result's task type is taken from."""
        return (self.chosen.target or self.chosen.experts[0]).config

    def _modules(self) -> Iterator[MergedModule]:
        with self.request.track("merge", len(self.merge.names), "modules") as advance:
            for name in self.merge.names:
                yield self.merge.module(name)
                advance(1)

    def _write(self) -> dict[str, Any]:
        merge, request = self.merge, self.request
        experts = self.chosen.experts

        def documents(summaries: Sequence[Summary]) -> Documents:
            self.summaries = list(summaries)
            coefficients = self._coefficients(merge.experts, self.weights)
            tokenizer = tokenizer_folder(experts, map(merge.layout, merge.names), self.head)
            return Documents(self._manifest_of_updates(), coefficients, self._adapter_card(), tokenizer)

        written = write_expert(
            request.folder,
            Layout(
                [merge.layout(name) for name in merge.names],
                merge.dtype,
                merge.has_bias,
                request.verify,
                self.as_hadamard,
            ),
            self._modules(),
            self.head,
            base=merge.experts[0].base,
            like={**self._like, "fan_in_fan_out": any(expert.config.get("fan_in_fan_out") for expert in experts)},
            documents=documents,
            force=request.force,
        )
        return {
            **self._heading,
            **written.manifest.results,
            "experts": [expert.name for expert in merge.experts],
            "weights": flat(merge.weights) or merge.weights,
        }

    def _manifest_of_updates(self, **more: Any) -> Manifest:
        merge, request = self.merge, self.request
        results: dict[str, Any] = {
            "truncation": relative_error(self.summaries),
            "rounding": rounding_error(self.summaries),
            "rank": max(s.rank for s in self.summaries),
            "modules": {
                s.name: {"rank": s.rank, "truncation": s.error, "rounding": s.rounding_error} for s in self.summaries
            },
        }
        if self.deviation is not None:
            results["verified"] = self.deviation
        settings = {
            "scales": [expert.strength for expert in merge.experts],
            "space": request.space,
            "rank": str(request.rank),
            "energy": merge.truncation.energy,
            "dtype": request.dtype or self._dtype,
        }
        return self._manifest(merge.experts, merge.weights, results, **settings, **more)

    @property
    def _truncation_text(self) -> str:
        """A sentence on the ranks and the errors."""
        error, rounding = relative_error(self.summaries), rounding_error(self.summaries)
        ranks = "/".join(map(str, sorted({s.rank for s in self.summaries})))
        return (
            f"rank {ranks} of {len(self.summaries)} modules; "
            + (f"{error:.2%} of ‖ΔW‖ is lost." if error else "nothing is lost.")
            + (f" Rounding to {self._dtype} changes ΔW by {rounding:.2g} of ‖ΔW‖." if rounding else "")
        )

    def _adapter_card(self) -> str:
        base, _ = base_reference(self.merge.experts[0].base, self.request.folder)
        return self._card(
            base,
            sources_of(self.merge.experts, self.merge.weights),
            self._truncation_text,
            loading_code(self._like, self.merge.experts[0].base, base, self.head),
            "loha" if self.as_hadamard else "lora",
            space=self.merge.space,
        )


def merged_updates(request: MergeRequest, method: OpenedMethod, chosen: ChosenExperts) -> MergedUpdates:
    """Check a merge of experts with updates ΔW."""
    settings = UpdateSettings(
        truncation=request.truncation(),
        space=request.space,
        dtype=request.torch_dtype(),
        read=reader_of(chosen.experts),
        **statistics_of(request.store, chosen.experts, method),
    )
    merge = prepare(chosen.experts, chosen.weights, method, settings, request.selects)
    head = choose_head(request.head, chosen.experts, chosen.target)
    head = with_base_parameters(head, request.head, chosen, method, merge.names)
    refuse_updates_of_head(merge.experts, merge.names, head)
    as_hadamard = request.into is None and _needs_hadamard(merge)
    return MergedUpdates(request, method, chosen, head, merge, as_hadamard=as_hadamard)


def _needs_hadamard(merge: UpdateMerge) -> bool:
    """Whether the result has to be a LoHa, since PEFT's LoRA cannot hold the update of a convolution in groups."""
    layouts = {name: merge.layout(name) for name in merge.names}
    grouped = maybe_grouped(merge.experts[0].base, layouts)
    turned = any(bool(expert.config.get("fan_in_fan_out")) for expert in merge.experts)
    if grouped and not fits_hadamard(list(layouts.values()), merge.has_bias, turned):
        raise PimergeError(
            f"the channels of '{grouped[0]}' are or may be divided into groups, which no LoRA of PEFT can update, and "
            "the other modules do not fit a LoHa",
            "merge it into the base, --into BASE, or leave the module out with --exclude",
        )
    return bool(grouped)
