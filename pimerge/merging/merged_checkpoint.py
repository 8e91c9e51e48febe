"""Merge full checkpoints, W = W0 + merge(W_n − W0), and write the result in the layout of the base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from pimerge.adapters.model_card import Source, licence_of
from pimerge.checkpoints.adapter_keys import is_adapter_file
from pimerge.checkpoints.base import given_base
from pimerge.checkpoints.checkpoint import Checkpoint, is_checkpoint, is_state_dict, open_checkpoint
from pimerge.checkpoints.tokenizer_files import copy_tokenizer
from pimerge.checkpoints.unique_names import unique_names
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.files import hashes_of, json_text, new_file, new_folder, sha256_file, write_into
from pimerge.core.manifest import MANIFEST_FILE, Manifest
from pimerge.merging.checkpoint_check import check_checkpoint
from pimerge.merging.checkpoint_merge import MergedTensors, merge_checkpoints
from pimerge.merging.checkpoint_plan import CheckpointPlan, plan_checkpoints
from pimerge.merging.choice import require_one_each, weights_by_score
from pimerge.merging.into_checkpoint import refuse_checkpoint
from pimerge.merging.merged import FILE_LOADING, FOLDER_LOADING, Merged, flat
from pimerge.merging.method import METHODS, OpenedMethod, Space
from pimerge.merging.request import HeadPolicy, MergeRequest
from pimerge.merging.weights import by_module, parse_rules, starting_weights


@dataclass
class MergedCheckpoint(Merged):
    """Merged full checkpoints, which are written in the layout of their base.

    Attributes:
        checkpoints: the tensors to read and write.
        weights: key in the base → one weight per expert.
        written: statistics of the written checkpoint; None before it is saved.
    """

    is_adapter: ClassVar[bool] = False
    checkpoints: CheckpointPlan
    weights: dict[str, list[float]]
    written: MergedTensors | None = field(default=None, init=False)

    @property
    def plan(self) -> dict[str, Any]:
        """The JSON document of ``--dry-run``."""
        plan = self.checkpoints
        entries = [plan.base.entry(key) for key in plan.merged]
        return {
            **self._heading,
            "experts": [{"name": expert.name, "sha256": expert.sha256} for expert in plan.experts],
            "merged": len(plan.merged),
            "kept": [key for key in plan.base.home if key not in plan.merged and key not in plan.heads],
            "heads": sorted(plan.heads),
            "dropped": list(plan.dropped),
            "memory": (len(plan.experts) + 3) * 4 * max((entry.end - entry.start for entry in entries), default=0),
            "size": plan.base.size,
            "handled": [plan.vocabulary] if plan.vocabulary else [],
        }

    def check(self) -> None:
        """Report special cases."""
        if self.checkpoints.vocabulary:
            self.request.note(self.checkpoints.vocabulary)

    def refuse_over_inputs(self) -> None:
        """Refuse an output that is one of the checkpoints or contains one."""
        for checkpoint in (self.checkpoints.base, *self.checkpoints.experts):
            refuse_checkpoint(self.request.output, checkpoint.path)

    @property
    def _decisive(self) -> dict[str, Any]:
        plan = self.checkpoints
        return {
            "experts": [(each.name, each.sha256) for each in plan.experts],
            "base": plan.base.sha256,
            "weights": self.weights,
            "heads": sorted(plan.heads),
        }

    @property
    def writes_file(self) -> bool:
        """Whether the result can be a single file, as its base is."""
        return self.checkpoints.base.is_file

    def _write(self) -> dict[str, Any]:
        request, plan, single = self.request, self.checkpoints, self.file_output
        if single is not None:
            with new_file(single, force=request.force) as partial:
                manifest = self._merge(partial)
            return {**self._heading, **manifest.results}
        with new_folder(request.folder, force=request.force) as partial:
            manifest = self._merge(partial / plan.base.name if plan.base.is_file else partial)
            if plan.tokenizer is not None:
                copy_tokenizer(plan.tokenizer.path, partial)
            write_into(partial, {"README.md": self._checkpoint_card()})
            manifest = manifest.model_copy(update={"outputs": hashes_of(partial)})
            write_into(partial, {MANIFEST_FILE: json_text(manifest.model_dump())})
        return {**self._heading, **manifest.results}

    def _merge(self, output: Path) -> Manifest:
        """Write the merged tensors to a file or into a folder."""
        request, plan = self.request, self.checkpoints
        self.written = merge_checkpoints(
            plan, self.weights, self.method, output, dtype=request.torch_dtype(), track=request.track
        )
        check_checkpoint(output, plan.base, plan.head_shapes)
        return self._manifest(
            plan.experts,
            self.weights,
            {"merged": self.written.merged, "kept": self.written.kept, "dropped": list(self.written.dropped)},
            base=plan.base.name if request.base else None,
            base_sha256=plan.base.sha256 if request.base else None,
        )

    def _checkpoint_card(self) -> str:
        plan, rows = self.checkpoints, flat(self.weights)
        weights = ["by tensor"] * len(plan.experts) if rows is None else [f"{value:.3f}" for value in rows]
        return self._card(
            plan.base.name,
            [
                Source(expert.name, expert.sha256, licence_of(expert.path), weight)
                for expert, weight in zip(plan.experts, weights, strict=True)
            ],
            "nothing is truncated.",
            FILE_LOADING.format(json.dumps(f"path/to/this/folder/{plan.base.name}"))
            if plan.base.is_file
            else FOLDER_LOADING,
        )


def merged_checkpoint(request: MergeRequest, method: OpenedMethod) -> MergedCheckpoint:
    """Check a merge of full checkpoints against their base."""
    paths = [Path(str(reference)) for reference in request.experts or ()]
    _refuse_other_options(request, method, paths)
    base, experts = _open(request, paths)
    target = _target(request, paths, [expert.name for expert in experts])
    plan = plan_checkpoints(
        base,
        experts,
        method,
        fishers=list(request.fisher),
        head=request.head if target is not None or request.head != HeadPolicy.TARGET else _head_of(base, experts),
        target=target,
        selected=request.selects,
    )
    request.require_globs_match(list(base.home))
    if not plan.merged and not plan.heads:
        raise PimergeError(
            "no tensor is left to merge",
            f"the base has {len(base.home)}, such as '{next(iter(base.home))}'; look at --include and --exclude",
        )
    rules = parse_rules(request.rules)
    require_one_each(request.weights, [expert.name for expert in experts])
    start = starting_weights(method, len(experts), request.weights, bool(rules))
    weights = by_module(list(base.home), experts, list(map(str, request.experts or ())), start, rules)
    sums = {round(sum(row), 9) for row in weights.values()}
    if request.base is None and method.space is Space.LINEAR and sums != {1.0}:
        raise PimergeError(
            f"without a base the weights must sum to 1; got {sorted(sums)[0]:g}",
            "pass weights that sum to 1, or --base",
        )
    return MergedCheckpoint(request, method, plan, weights)


def _refuse_other_options(request: MergeRequest, method: OpenedMethod, paths: Sequence[Path]) -> None:
    why = "applies to adapters, and the experts are full checkpoints"
    problems = request.problems_for_updates_only(why)
    given = {"--coefficients": request.coefficients, "--alpha": request.alpha, "--into": request.into}
    for option, value in given.items():
        if value is not None:
            problems.add(f"{option} {why}", f"leave out {option}")
    for path in paths:
        if not is_checkpoint(path):
            problems.add(
                f"'{path}' is {'an adapter' if is_adapter_file(path) else 'not a full checkpoint'}, but others are "
                "full checkpoints or state dicts",
                "first merge adapters into a checkpoint, with --into",
            )
    # if the weights sum to 1, the base cancels
    if request.base is None and not (method.strategy.averages and all(map(is_state_dict, paths))):
        names = ", ".join(other.name for other in METHODS if other.averages)
        problems.add(
            "full checkpoints are merged relative to their base, and none is given",
            f"pass --base FOLDER_OR_HUB_ID; only {names} merge single .safetensors files without one",
        )
    problems.raise_any("these checkpoints cannot be merged")


def _open(request: MergeRequest, paths: Sequence[Path]) -> tuple[Checkpoint, list[Checkpoint]]:
    reference = request.base or str(paths[0])  # of files without a base, the first gives the layout
    folder = Path(reference) if Path(reference).exists() else given_base(reference).folder
    if folder is None:
        raise PimergeError(f"the base '{request.base}' is not on this machine", "download it first: hf download NAME")
    problems = Problems()
    opened = []
    for path in [folder, *paths]:
        with problems.collected():
            opened.append(open_checkpoint(path))
        with problems.collected():
            refuse_checkpoint(request.output, path)
    problems.raise_any("some checkpoints cannot be opened")
    names = unique_names(opened[1:])
    return opened[0], [replace(found, label=name) for found, name in zip(opened[1:], names, strict=True)]


def _target(request: MergeRequest, paths: Sequence[Path], names: Sequence[str]) -> int | None:
    """Return the index of the target's checkpoint among the experts; a single expert is its own target.

    Args:
        names: the experts' names, which differ for folders of one name.
    """
    if request.target is None:
        return 0 if len(paths) == 1 else None
    target = request.target if isinstance(request.target, str | Path) else request.target.path
    found = [number for number, path in enumerate(paths) if path.resolve() == Path(target).resolve()]
    found = found or [number for number, name in enumerate(names) if name == str(target)]
    named = {path.resolve() for path in paths if path.name == str(target)}
    if not found and len(named) > 1:
        raise PimergeError(
            f"{len(named)} of the given checkpoints have the name '{target}' of the target",
            f"pass --target with one of {', '.join(names)}",
        )
    found = found or [number for number, path in enumerate(paths) if path.name == str(target)]
    if not found:
        raise PimergeError(
            f"the target '{target}' is not one of the given checkpoints", f"name one of them: {', '.join(names)}"
        )
    return found[0]


def _head_of(base: Checkpoint, experts: Sequence[Checkpoint]) -> HeadPolicy:
    """Choose the head without a target: the average if all checkpoints have the labels of the base."""
    labels = {str(found.config.get("id2label")) for found in (base, *experts)}
    return HeadPolicy.AVERAGE if len(labels) == 1 else HeadPolicy.TARGET


def with_ranked_state_dicts(request: MergeRequest, method: OpenedMethod) -> MergeRequest:
    """Add the files selected by a ranking of plain state dicts to a request without experts.

    As for adapters, methods that join the target add the target's own file.
    """
    from pimerge.adapters.ranking_document import read_ranking

    if request.experts or request.coefficients is not None:
        return request
    if isinstance(request.ranking, Path) and not request.ranking.is_file():
        return request
    ranking = read_ranking(request.ranking) if isinstance(request.ranking, Path) else request.ranking
    chosen, target = ranking.chosen(), ranking.target
    files = [ranking.path.parent / candidate.path for candidate in chosen]
    if not chosen or not all(file.suffix == ".safetensors" and not is_adapter_file(file) for file in files):
        return replace(request, ranking=ranking)
    taken = [target, *chosen] if method.strategy.joins_target else chosen
    folder, problems = ranking.path.parent, Problems()
    for reference in taken:
        path = folder / reference.path
        if not path.is_file() or sha256_file(path) != reference.sha256:
            state = "has changed" if path.is_file() else "was deleted"
            problems.add(f"'{path}' {state} after '{ranking.path}' was written", "run 'pimerge rank' again")
    problems.raise_any("the state dicts of the ranking cannot be merged")
    weights = request.weights
    if weights is None and not request.rules and method.strategy.weights_by_score:
        hashes, scores = [each.sha256 for each in taken], [None, *(candidate.score for candidate in chosen)]
        weights = weights_by_score(request, method, hashes, target.sha256, scores)
    return replace(request, experts=[folder / reference.path for reference in taken], weights=weights)
