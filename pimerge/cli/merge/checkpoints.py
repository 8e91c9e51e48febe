"""``pimerge merge`` of full checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pimerge.checkpoints.checkpoint import is_checkpoint, is_state_dict
from pimerge.cli.console import note, print_json, print_table, size_text, tracker
from pimerge.cli.inputs import parse_numbers
from pimerge.cli.merge.request import Request
from pimerge.cli.merge.show import method_summary
from pimerge.core.errors import PimergeError, Problems
from pimerge.merging.weights import starting_weights

if TYPE_CHECKING:
    from pimerge.checkpoints.checkpoint import Checkpoint
    from pimerge.merging.checkpoint_plan import MergePlan

_FOLDER_LOADING = """
from transformers import AutoModel  # or the Auto class of your task

model = AutoModel.from_pretrained("path/to/this/folder")
"""
_FILE_LOADING = """
from safetensors.torch import load_file

tensors = load_file("path/to/this/folder/{}")
"""
BASELESS = ("uniform", "interpolated", "fisher")
"""Methods that average the numbers themselves."""


def run(request: Request) -> None:
    """Merge full checkpoints against their base into a full checkpoint."""
    from pimerge.core.files import require_absent
    from pimerge.merging.checkpoint_plan import plan_merge

    _refuse_other_options(request)
    method = request.open_method()
    if not request.dry_run:
        require_absent(request.output, request.force)
    base, experts = _open(request)
    target = _target(request)
    plan = plan_merge(
        base,
        experts,
        method,
        fishers=list(request.fisher) or None,
        head=request.head if target is not None or request.head != "target" else _head_of(base, experts),
        target=target,
        selected=request.selects,
    )
    request.require_globs_match(list(base.home))
    if not plan.merged and not plan.heads:
        raise PimergeError(
            "no tensor is left to merge",
            f"the base has {len(base.home)}, such as '{next(iter(base.home))}'; look at --include and --exclude",
        )
    weights = _weights(request, base, experts)
    sums = {round(sum(row), 9) for row in weights.values()}
    if request.base is None and method.space == "linear" and sums != {1.0}:
        raise PimergeError(
            f"the weights sum to {sorted(sums)[0]:g}, and without a base only a mean has a meaning",
            "pass weights that sum to 1, or --base",
        )
    if request.dry_run:
        _print_plan(request, plan, weights)
        return
    _write(request, plan, weights)


def _refuse_other_options(request: Request) -> None:
    given = {
        "--rank": request.rank != "max",
        "--energy": request.energy is not None,
        "--space": request.space != "core",
        "--into": request.into is not None,
        "--verify": request.verify,
        "--coefficients": request.coefficients is not None,
        "--alpha": request.alpha is not None,
    }
    problems = Problems()
    for option in [option for option, is_given in given.items() if is_given]:
        problems.add(f"{option} is for adapters, and the experts are full checkpoints", "leave it out")
    for reference in request.experts or []:
        if not is_checkpoint(reference):
            problems.add(f"'{reference}' is no full checkpoint, and others are", "fold adapters in first, with --into")
    if request.base is None and not _is_baseless(request):
        problems.add(
            "full checkpoints merge against their base, and none is given",
            "pass --base FOLDER_OR_HUB_ID; single .safetensors files do without by uniform, interpolated and fisher",
        )
    problems.raise_any("these checkpoints cannot be merged")


def _is_baseless(request: Request) -> bool:
    """Whether the numbers themselves are averaged, so that no base is needed: it is in no mean of weights of sum 1."""
    return request.method in BASELESS and all(is_state_dict(reference) for reference in request.experts or [])


def _open(request: Request) -> tuple[Checkpoint, list[Checkpoint]]:
    from pimerge.checkpoints.base import find_base
    from pimerge.checkpoints.checkpoint import open_checkpoint

    reference = request.base or (request.experts or [""])[0]  # of files without a base, the first gives the layout
    name, _, revision = reference.partition("@")
    folder = Path(reference) if Path(reference).exists() else find_base(name, revision or None, Path.cwd()).folder
    if folder is None:
        raise PimergeError(f"the base '{request.base}' is not on this machine", "download it first: hf download NAME")
    problems = Problems()
    opened = []
    for path in [folder, *map(Path, request.experts or [])]:
        with problems.collected():
            opened.append(open_checkpoint(path))
        if path.resolve().is_relative_to(request.output.resolve()):
            problems.add(
                f"the output '{request.output}' is the checkpoint '{path}' or holds it", "choose another --output"
            )
    problems.raise_any("some checkpoints cannot be opened")
    return opened[0], opened[1:]


def _target(request: Request) -> int | None:
    """The number of the target's checkpoint among the experts; a single one is its own target."""
    if request.target is None:
        return 0 if len(request.experts or []) == 1 else None
    wanted = Path(request.target).resolve()
    for number, reference in enumerate(request.experts or []):
        if Path(reference).resolve() == wanted or Path(reference).name == request.target:
            return number
    raise PimergeError(f"the target '{request.target}' is not among the checkpoints given", "name one of them")


def _head_of(base: Checkpoint, experts: Sequence[Checkpoint]) -> str:
    """Without a target: the mean where all have the base's labels, so that there is nothing to choose."""
    labels = {str(found.config.get("id2label")) for found in (base, *experts)}
    return "average" if len(labels) == 1 else "target"


def _weights(request: Request, base: Checkpoint, experts: Sequence[Checkpoint]) -> dict[str, list[float]]:
    from pimerge.merging.weights import by_module, parse_rules

    method = request.open_method()
    rules = parse_rules(request.rules)
    given = parse_numbers(request.weights, "--weights") if request.weights is not None else None
    if given is not None and len(given) != len(experts):
        raise PimergeError(
            f"--weights holds {len(given)} numbers for {len(experts)} experts", "give one for each, in order"
        )
    start = starting_weights(method, len(experts), given, bool(rules))
    return by_module(list(base.home), experts, request.experts or [], start, rules)


def _print_plan(request: Request, plan: MergePlan, weights: dict[str, list[float]]) -> None:
    kept = [key for key in plan.base.home if key not in plan.merged and key not in plan.heads]
    entries = [plan.base.entry(key) for key in plan.merged]
    memory = (len(plan.experts) + 3) * 4 * max((entry.end - entry.start for entry in entries), default=0)
    document = {
        "output": str(request.output),
        "method": request.method,
        "experts": [{"name": expert.name, "sha256": expert.sha256} for expert in plan.experts],
        "merged": len(plan.merged),
        "kept": kept,
        "heads": sorted(plan.heads),
        "dropped": list(plan.dropped),
        "memory": memory,
        "size": plan.base.size,
    }
    if request.json:
        print_json(document)
        return
    shares = sorted({tuple(row) for row in weights.values()})
    text = ", ".join(f"{value:.3f}" for value in shares[0]) if len(shares) == 1 else "by tensor"
    rows = [["experts", ", ".join(expert.name for expert in plan.experts)], ["weights", text]]
    rows += [["merged", f"{len(plan.merged)} tensors by '{request.method}'"]]
    rows += [["kept", f"{len(kept)} tensors of the base" + (f", such as '{kept[0]}'" if kept else "")]]
    rows += [["heads", ", ".join(sorted(plan.heads))]] if plan.heads else []
    rows += [["left out", f"the heads {', '.join(plan.dropped)}: --head {request.head}"]] if plan.dropped else []
    rows += [["memory", f"about {size_text(memory)} for the largest tensor"]]
    rows += [["output", f"{request.output}, {size_text(plan.base.size)}; nothing is written now"]]
    print_table(["", ""], rows)


def _write(request: Request, plan: MergePlan, weights: dict[str, list[float]]) -> None:
    from pimerge.core.files import hashes_of, json_text, new_folder, write_into
    from pimerge.core.manifest import MANIFEST_FILE, Manifest, inputs_of, library_versions
    from pimerge.merging.checkpoint_merge import merge_checkpoints

    method = request.open_method()
    with new_folder(request.output, force=request.force) as partial:
        written = merge_checkpoints(
            plan,
            weights,
            method,
            partial / plan.base.name if plan.base.is_file else partial,
            dtype=request.torch_dtype(),
            track=tracker(request.quiet),
        )
        write_into(partial, {"README.md": _card(request, plan, weights)})
        rows = sorted({tuple(row) for row in weights.values()})
        manifest = Manifest(
            command="merge",
            options={
                "method": request.method,
                **method.options,
                "weights": list(rows[0]) if len(rows) == 1 else weights,
                "base": plan.base.name if request.base else None,
                "base_sha256": plan.base.sha256 if request.base else None,
                "seed": request.seed,
                "include": list(request.include),
                "exclude": list(request.exclude),
                "head": request.head,
                "dtype": request.dtype,
            },
            device="cpu",
            versions=library_versions(),
            inputs=inputs_of(plan.experts),
            outputs=hashes_of(partial),
            results={"merged": written.merged, "kept": written.kept, "dropped": list(written.dropped)},
        )
        write_into(partial, {MANIFEST_FILE: json_text(manifest.model_dump())})
    if request.json:
        print_json({"output": str(request.output), "method": request.method, **manifest.results})
        return
    row = [str(written.merged), str(written.kept), str(len(written.dropped)), size_text(written.size)]
    print_table(["merged", "kept", "left out", "size"], [row], right=["merged", "kept", "left out"])
    note(f"→ {request.output}: a full checkpoint", request.quiet)


def _card(request: Request, plan: MergePlan, weights: dict[str, list[float]]) -> str:
    from pimerge.adapters.model_card import Source, card, licence_of

    rows = {tuple(row) for row in weights.values()}
    shares = [f"{value:.3f}" for value in next(iter(rows))] if len(rows) == 1 else ["by tensor"] * len(plan.experts)
    return card(
        plan.base.name,
        [
            Source(expert.name, expert.sha256, licence_of(expert.path), share)
            for expert, share in zip(plan.experts, shares, strict=True)
        ],
        request.method,
        method_summary(request.method),
        {**request.open_method().options, "seed": request.seed},
        "nothing is truncated.",
        _FILE_LOADING.format(plan.base.name) if plan.base.is_file else _FOLDER_LOADING,
        adapter=False,
    )
