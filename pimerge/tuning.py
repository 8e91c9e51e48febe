"""Compose experts inside the model, train on the target's examples, export one expert.

Checkpoints lie beside the output until the output is complete.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pimerge import strategies
from pimerge.backbone import inside, lora_targets
from pimerge.base import Base
from pimerge.compatibility import refuse_over_inputs, require_alike, require_finite
from pimerge.composition import ComposedLinear, Member, Mixture, compose
from pimerge.errors import PimergeError, Problems
from pimerge.expert import Expert
from pimerge.export import Coefficients, Documents, Head, Layout, write_expert, write_groups
from pimerge.files import relative_to, require_absent, sha256_bytes
from pimerge.fresh_expert import fresh_expert
from pimerge.group_composition import GroupMember, compose_groups, fresh_member, member_of
from pimerge.kinds.lora import Factors, parse
from pimerge.lowrank import DEFAULT_ENERGY, MergedModule, Truncation, relative_error, weighted_bias, weighted_sum
from pimerge.manifest import Manifest, inputs_of, library_versions
from pimerge.model import LoadedBase, in_head, load_base, resolve_device, resolve_dtype, set_head
from pimerge.progress import Track, silent
from pimerge.task import Task
from pimerge.task_types import Examples, for_base
from pimerge.training import Options, Outcome, check_options, split_holdout, train, untrained
from pimerge.tune_methods import Plan

STARTS = ("ranking", "equal")
LORA = "lora"
HEAD_ALONE = Plan(fresh=True)
NO_EXPERT = "the target has no expert of its own: a fresh one takes its place"


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` wrote.

    Attributes:
        rank: of the updates; 0 for kinds without ΔW.
        truncation: relative error of cutting the sum to the asked rank.
        examples: trained on.
        weights: module → weight of each of ``experts``.
        scales: of the update of each of ``experts``, before its weight.
    """

    path: Path
    rank: int
    truncation: float
    outcome: Outcome
    examples: int
    weights: dict[str, list[float]]
    experts: list[str]
    scales: list[float]


def tune(
    method: str,
    task: Task,
    base: Base,
    experts: Sequence[Expert],
    target: Expert | None,
    output: Path,
    options: Options,
    *,
    scores: Sequence[float | None] | None = None,
    like: Expert | None = None,
    instead_of: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    track: Track = silent,
    note: Callable[[str], None] = lambda message: None,
) -> Tuned:
    """Compose, train and export.

    Args:
        method: a tune method.
        task: the target's task.
        experts: the chosen ones.
        target: the target's own expert, if it has one.
        scores: of the experts in the ranking; the weights start from their softmax, with 1/N for the target's
            own. None, or None for one of them, is an equal start.
        like: whose rank, alpha and modules a fresh expert has; by default the target's own, else the first of
            ``experts``.
        instead_of: the method that was asked for, where this one takes its place; for the manifest.
        note: told what the user should know, a sentence at a time.

    Raises:
        PimergeError: if the experts, the task, an option or the disk has a problem.
    """
    plan: Plan = strategies.load("tune_methods", method).PLAN
    require_absent(output, force)
    refuse_over_inputs(output, [*experts, *([target] if target else [])])
    check_options(options)
    _check_kind(method, plan, options)
    options = options if options.lr is not None else replace(options, lr=plan.lr)
    chosen = _chosen(plan, method, experts, target)
    like = target or like or next(iter(chosen), None)
    like_sha256 = like.sha256 if like else None
    run = _run_folder(method, task, base, chosen, output, options, scores, device, dtype, like_sha256)
    resolved = resolve_device(device)
    precision = resolve_dtype(dtype, resolved)
    loaded = load_base(base, task, resolved, precision, options.seed)
    if plan == HEAD_ALONE and not loaded.head:
        raise PimergeError(
            f"'{method}' trains a head alone, and a base that answers in text ({task.file.type}) has none to train",
            "take 'scratch' for a control without experts; 'pimerge eval' scores the bare base, too",
        )
    _require_heads_alone([*chosen, *([target] if target and plan.target else [])], loaded)
    if plan.target and target is not None:
        set_head(loaded.model, target.head_tensors())
    sum_of_experts: _Updates | _Groups
    with _form(plan, chosen, like, options, loaded, base, task) as form:
        if form is None:
            sum_of_experts = _Updates(*_members(plan, loaded, chosen, target, like, options, note), plan)
        else:
            sum_of_experts = _Groups(form, *_group_members(plan, loaded, form, chosen, target, options, note), plan)
        names, fresh = sum_of_experts.names, sum_of_experts.fresh
        logits = _start(plan, len(names), experts, chosen, scores)
        mixture = Mixture(sum_of_experts.parts, logits, options.granularity, plan.train_weights and len(names) > 1)
        sum_of_experts.compose(loaded, mixture)
    kept, held_out = _examples(task, loaded, form, options, note)
    model = sum_of_experts.through or loaded.model
    if loaded.head or any(p.requires_grad for p in (*mixture.parameters(), *model.parameters())):
        outcome = train(
            loaded,
            mixture.to(resolved),
            kept,
            held_out,
            run,
            options,
            precision,
            through=model,
            track=track,
            note=note,
        )
    else:
        note(f"'{method}' trains nothing but a head, and {task.file.type} has none: the experts are summed as they are")
        outcome = untrained()
    rank, error = sum_of_experts.collapse(mixture, Truncation(options.rank))
    coefficients = Coefficients(
        method=method,
        granularity=options.granularity,
        experts=[relative_to(expert.path, output) for expert in chosen],
        sha256=[expert.sha256 for expert in chosen],
        scales=[expert.scale for expert in chosen],
        experts_trained=plan.train_experts,
        weights=mixture.weights(),
    )
    manifest = Manifest(
        command="tune",
        options={
            "method": method,
            **({"instead_of": instead_of} if instead_of else {}),
            "target": task.name,
            **asdict(options),
            "start": logits,
            "scales": [expert.scale for expert in chosen],
            "dtype": str(precision),
        },
        device=resolved.type,
        versions=library_versions(),
        inputs=inputs_of(chosen),
        outputs={},
        results={
            "truncation": error,
            "train_examples": len(kept),
            "held_out_examples": len(held_out) if held_out else 0,
            "epochs": outcome.epochs,
            "train_loss": outcome.train_loss,
            "held_out_loss": outcome.held_out_loss,
            "trained_parameters": outcome.trained_parameters,
        },
    )
    if outcome.writes:
        head = Head({name: tensor.float().cpu() for name, tensor in loaded.head_tensors().items()}, loaded.head, task)
        documents = Documents(manifest, None if fresh else coefficients)
        sum_of_experts.write(output, head, loaded, task, base, documents, force)
        shutil.rmtree(run, ignore_errors=True)
    return Tuned(
        output,
        rank,
        error,
        outcome,
        len(kept),
        mixture.weights(),
        names,
        [1.0] * (len(names) - len(chosen)) + [expert.scale for expert in chosen],  # a fresh one goes first
    )


class _Updates:
    """A sum of updates ΔW: how it is composed, collapsed and written."""

    through: nn.Module | None = None

    def __init__(self, members: Sequence[Member], fresh: bool, plan: Plan) -> None:
        self.members, self.fresh, self.plan = members, fresh, plan
        self.names = [member.name for member in members]
        self.parts = sorted({name for member in members for name in member.modules})

    def compose(self, loaded: LoadedBase, mixture: Mixture) -> None:
        self.layers = compose(loaded.model, self.members, mixture, self.plan.train_experts)

    def collapse(self, mixture: Mixture, truncation: Truncation) -> tuple[int, float]:
        """The rank of the result, and the relative error of cutting it to that."""
        self.layout, self.merged = _collapse(self.layers, self.members, mixture, truncation)
        summaries = [module.summary for module in self.merged]
        return max(summary.rank for summary in summaries), relative_error(summaries)

    def write(
        self, output: Path, head: Head, loaded: LoadedBase, task: Task, base: Base, documents: Documents, force: bool
    ) -> None:
        like = _config_fields(loaded, task, self.layers)
        write_expert(
            output, self.layout, self.merged, head, base=base, like=like, documents=lambda _: documents, force=force
        )


class _Groups:
    """The same for experts without ΔW: a sum of tensors."""

    def __init__(self, form: Expert, members: Sequence[GroupMember], fresh: bool, plan: Plan) -> None:
        self.form, self.members, self.fresh, self.plan = form, members, fresh, plan
        self.names = [member.name for member in members]
        self.parts = form.parts

    def compose(self, loaded: LoadedBase, mixture: Mixture) -> None:
        self.composition = compose_groups(loaded, self.form, self.members, mixture, self.plan.train_experts)
        self.through: nn.Module | None = self.composition.model

    def collapse(self, mixture: Mixture, truncation: Truncation) -> tuple[int, float]:
        """Nothing is cut off."""
        self.tensors = self.composition.collapsed()
        return 0, 0.0

    def write(
        self, output: Path, head: Head, loaded: LoadedBase, task: Task, base: Base, documents: Documents, force: bool
    ) -> None:
        write_groups(
            output,
            lambda: self.tensors,
            head,
            base=base,
            like=self.form,
            documents=lambda: documents,
            force=force,
        )


@contextmanager
def _form(
    plan: Plan,
    chosen: Sequence[Expert],
    like: Expert | None,
    options: Options,
    loaded: LoadedBase,
    base: Base,
    task: Task,
) -> Iterator[Expert | None]:
    """An expert whose form the sum has, if it is of a kind without ΔW; None for LoRA."""
    kind = options.fresh_kind
    if kind is None:
        yield _known_form(plan, chosen, like, options)
    elif kind == LORA:
        yield None
    else:
        with fresh_expert(kind, loaded, base, task, options.fresh_rank, options.fresh_modules) as form:
            yield form


def _check_kind(method: str, plan: Plan, options: Options) -> None:
    """Check that a fresh expert of a kind can be trained.

    Raises:
        PimergeError: if there is no such kind, or the method or another option does not go with it.
    """
    if options.fresh_kind is None:
        return
    strategies.load("kinds", options.fresh_kind)
    if plan.experts or not plan.train_experts:
        raise PimergeError(
            f"--kind is for a fresh expert alone, and '{method}' trains none", "leave it out, or take --method scratch"
        )
    if options.fresh_kind == LORA:
        return
    for option, value in (("--fresh-alpha", options.fresh_alpha), ("--rank", options.rank)):
        if value is not None:
            raise PimergeError(f"{option} is for LoRA, and --kind is '{options.fresh_kind}'", "leave it out")


def _known_form(plan: Plan, chosen: Sequence[Expert], like: Expert | None, options: Options) -> Expert | None:
    form = chosen[0] if chosen else like
    if form is None or not form.groups:
        return None
    if not plan.experts and (options.fresh_rank or options.fresh_modules or options.fresh_alpha):
        return None  # a fresh LoRA is asked for
    if not plan.experts and not plan.train_experts and not form.has_strength:
        return None  # a fresh prompt that is not trained would change the base
    if options.rank is not None:
        raise PimergeError(f"--rank is for updates ΔW, and experts of kind {form.kind} have none", "leave it out")
    return form


def _group_members(
    plan: Plan,
    loaded: LoadedBase,
    form: Expert,
    chosen: Sequence[Expert],
    target: Expert | None,
    options: Options,
    note: Callable[[str], None],
) -> tuple[list[GroupMember], bool]:
    """As :func:`_members`, for experts without ΔW."""
    members = [member_of(expert, loaded) for expert in chosen]
    if not plan.fresh and not (plan.target and target is None):
        return members, False
    if plan.target:
        note(NO_EXPERT)
    return [fresh_member(form, loaded, options.init_seed), *members], True


def fresh_lora(
    loaded: LoadedBase, rank: int, alpha: float, modules: Sequence[str] | None, seed: int, name: str = "fresh"
) -> Member:
    """A fresh LoRA expert with PEFT's own init (A Kaiming-uniform, B zero); the base comes back as it was.

    Args:
        modules: names or name endings; None for those that PEFT adapts in this architecture.

    Raises:
        PimergeError: if PEFT finds no such modules.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(modules) if modules else None,
        exclude_modules=inside(loaded.head),
        base_model_name_or_path="",
    )
    try:
        model = get_peft_model(loaded.model, config)
    except ValueError as error:
        raise PimergeError(
            f"no modules to adapt in {type(loaded.model).__name__}: {str(error).partition(chr(10))[0]}",
            "pass --modules with the names of its projections, such as q_proj,v_proj",
        ) from error
    tensors = {key: value.detach().clone() for key, value in get_peft_model_state_dict(model).items()}
    model.unload()
    loaded.model.requires_grad_(False)
    layouts, _ = parse({"r": rank, "lora_alpha": alpha}, {key: tuple(value.shape) for key, value in tensors.items()})
    factors = {module: layout.factors(lambda key: tensors[key].float()) for module, layout in layouts.items()}
    return Member(name, layouts, factors)


def _chosen(plan: Plan, method: str, experts: Sequence[Expert], target: Expert | None) -> list[Expert]:
    """The experts in the sum, the target's own first; checked to fit each other."""
    if not plan.experts:
        return []
    if not experts:
        raise PimergeError(
            f"'{method}' needs experts to compose", "run 'pimerge rank --target NAME' first, or name the experts"
        )
    if plan.target and target is not None:
        experts = [target, *(expert for expert in experts if expert.path.resolve() != target.path.resolve())]
    require_alike(experts)
    require_finite(experts)
    return list(experts)


def _require_heads_alone(experts: Sequence[Expert], loaded: LoadedBase) -> None:
    """Check that experts have nothing but updates and heads, since nothing else is summed or trained.

    Raises:
        PimergeError: with each that has.
    """
    problems = Problems()
    for expert in {expert.path: expert for expert in experts}.values():
        stray = sorted({name.rpartition(".")[0] for name in expert.head if not in_head(name, loaded.head)})
        if stray:
            problems.add(
                f"'{expert.name}' has trained {', '.join(stray)} of the base (modules_to_save), which is no head and "
                "would be lost",
                "leave it out, or merge instead: pimerge merge keeps what the target saved",
            )
    problems.raise_any("these experts are more than updates and heads")


def _start(
    plan: Plan,
    count: int,
    experts: Sequence[Expert],
    chosen: Sequence[Expert],
    scores: Sequence[float | None] | None,
) -> list[float]:
    """Logits whose softmax the weights start from: the scores, and 1/N for a member that has none."""
    by_path = dict(zip((expert.path.resolve() for expert in experts), scores or [], strict=False))
    known = [by_path.get(expert.path.resolve()) for expert in chosen]
    ranked = [score for score in known if score is not None]
    own = count - len(chosen) + (1 if plan.target and len(chosen) == count else 0)  # target's or fresh: no score
    if not plan.ranked_start or not ranked or len(ranked) < count - own:
        return [0.0] * count
    # log-mean-exp of the others' scores: a softmax share of exactly 1/N
    middle = math.log(sum(math.exp(score) for score in ranked) / len(ranked))
    return [middle] * own + ranked


def _members(
    plan: Plan,
    loaded: LoadedBase,
    chosen: Sequence[Expert],
    target: Expert | None,
    like: Expert | None,
    options: Options,
    note: Callable[[str], None],
) -> tuple[list[Member], bool]:
    """The members of the sum, and whether one of them is fresh."""
    members = [_member(expert, options.rank, note) for expert in chosen]
    if not plan.fresh and not (plan.target and target is None):
        return members, False
    places = tuple(sorted(like.modules)) if like and like.modules else lora_targets(loaded.model)
    modules = options.fresh_modules or places
    like = like if like and like.kind == LORA else None  # others have no rank
    rank = options.fresh_rank or (max(like.ranks) if like else 8)
    alpha = options.fresh_alpha
    if alpha is None:
        alpha = max((module.alpha for module in like.modules.values()), default=float(rank)) if like else float(rank)
        alpha = alpha * rank / max(like.ranks) if like else alpha
    fresh = fresh_lora(loaded, rank if plan.train_experts else 1, alpha, modules, options.init_seed)
    if plan.target:
        note(NO_EXPERT)
    return [fresh, *members], True


def _member(expert: Expert, rank: int | None, note: Callable[[str], None]) -> Member:
    """An expert of the sum; one of another kind than LoRA becomes a LoRA.

    Args:
        rank: that it then has at most; None for what keeps most of ΔW.
    """
    if not expert.is_computed:
        return Member(expert.name, expert.modules, {name: expert.factors(name) for name in expert.modules})
    truncation = Truncation(rank, None if rank else DEFAULT_ENERGY)
    factors, summaries = {}, []
    for name, module in expert.modules.items():
        found = weighted_sum([expert.factors(name)], [1.0], truncation, torch.float64)
        factors[name] = found.factors
        summaries.append(MergedModule(module, found.factors, found.energy, found.lost).summary)
    note(
        f"'{expert.name}' is of kind {expert.kind}: it goes in as a LoRA of rank {max(s.rank for s in summaries)}, "
        f"without {relative_error(summaries):.1%} of its ‖ΔW‖ (--rank N for another rank)"
    )
    return Member(expert.name, expert.modules, factors)


def _examples(
    task: Task, loaded: LoadedBase, form: Expert | None, options: Options, note: Callable[[str], None]
) -> tuple[Examples, Examples | None]:
    config = loaded.config_for([form] if form else [])
    examples, labels = task.examples("train", loaded.processor, config, shots=options.shots, seed=options.seed)
    if examples.truncated:
        note(f"{examples.truncated} training examples are longer than the model takes and were cut")
    kept, held_out = split_holdout(labels, options.holdout, options.seed)
    if options.holdout and not held_out:
        note("too few examples to hold any out: no early stopping")
    return _subset(examples, kept), _subset(examples, held_out) if held_out else None


def _subset(examples: Examples, indices: Sequence[int]) -> Examples:
    return Examples([examples.lengths[i] for i in indices], lambda i: examples.get(indices[i]), examples.collate)


def _collapse(
    layers: dict[str, ComposedLinear], members: Sequence[Member], mixture: Mixture, truncation: Truncation
) -> tuple[Layout, list[MergedModule]]:
    """The trained sum as one expert, module by module."""
    weights = mixture.weights()
    layouts = {name: next(m.modules[name] for m in members if name in m.modules) for name in layers}
    has_bias = any(module.bias for member in members for module in member.modules.values())
    merged = []
    for name, layer in layers.items():
        parts = layer.parts(len(members))
        present = [(part, w) for part, w in zip(parts, weights[name], strict=True) if part is not None]
        factors, shares = [part for part, _ in present], [w for _, w in present]
        found = weighted_sum(factors, shares, truncation, torch.float32)
        bias = weighted_bias(factors, shares, torch.float32) if has_bias else None
        collapsed = Factors(found.factors.A.float(), found.factors.B.float(), 1.0, bias)
        merged.append(MergedModule(layouts[name], collapsed, found.energy, found.lost))
    return Layout(list(layouts.values()), torch.float32, has_bias), merged


def _config_fields(loaded: LoadedBase, task: Task, layers: dict[str, ComposedLinear]) -> dict[str, Any]:
    """What PEFT's config says besides the factors."""
    kind = type(loaded.model)
    peft_task = for_base(task.type.PEFT_TASK, loaded.config)
    return {
        "task_type": peft_task,
        "auto_mapping": None if peft_task else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "fan_in_fan_out": any(type(layer.layer).__name__ == "Conv1D" for layer in layers.values()),
    }


def _run_folder(method: str, task: Task, base: Base, chosen: Sequence[Expert], output: Path, *rest: Any) -> Path:
    """Where checkpoints lie: beside the output, a folder for each choice of inputs and options."""
    options = [asdict(part) if isinstance(part, Options) else part for part in rest]
    inputs = [(expert.sha256, expert.scale) for expert in chosen]
    choice = [method, task.sha256(), base.identity, inputs, options]
    digest = sha256_bytes(json.dumps(choice, sort_keys=True, default=str).encode())[:12]
    return output.resolve().with_name(f".{output.name}.training-{digest}")
