"""The components of a mixture: the chosen experts, the target's own expert, and fresh ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from pimerge.adapters.compatibility import require_alike, require_finite
from pimerge.adapters.expert import Expert
from pimerge.adapters.kind import KINDS
from pimerge.adapters.low_rank import DEFAULT_ENERGY, Truncation, weighted_sum
from pimerge.adapters.merged_module import MergedModule, relative_error
from pimerge.checkpoints.architecture import lora_targets
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.progress import Note
from pimerge.models.loaded_base import LoadedBase, in_head
from pimerge.tuning.fresh_expert import fresh_expert, fresh_lora, fresh_lora_like
from pimerge.tuning.lora_layers import LoraComponent
from pimerge.tuning.method import MixturePlan, TuneMethod
from pimerge.tuning.session import TuneRequest
from pimerge.tuning.tensor_layers import TensorComponent, component_of, fresh_component

TEMPERATURE = 0.1
"""Temperature of the softmax of expected gains with one labelled example; it shrinks as 1/√examples."""
Component = TypeVar("Component", LoraComponent, TensorComponent)
NO_EXPERT = "the target has no expert of its own: a fresh one takes its place"


def chosen_experts(method: TuneMethod, experts: Sequence[Expert], target: Expert | None) -> list[Expert]:
    """The experts in the mixture, the target's own first, checked to be compatible with each other."""
    if not method.plan.experts:
        return []
    if not experts:
        raise PimergeError(
            f"'{method.name}' needs experts to combine", "run 'pimerge rank --target NAME' first, or name the experts"
        )
    if method.plan.target and target is not None:
        experts = [target, *(expert for expert in experts if expert.path.resolve() != target.path.resolve())]
    require_alike(experts)
    require_finite(experts)
    return list(experts)


def require_heads_alone(experts: Sequence[Expert], loaded: LoadedBase) -> None:
    """Refuse experts that saved trained modules other than a head: tuning neither sums nor trains them."""
    problems = Problems()
    for expert in {expert.path: expert for expert in experts}.values():
        stray = sorted({name.rpartition(".")[0] for name in expert.head if not in_head(name, loaded.head)})
        if stray:
            problems.add(
                f"'{expert.name}' has trained {', '.join(stray)} of the base (modules_to_save), which is not a head "
                "and would be lost",
                "leave it out, or merge instead: pimerge merge keeps the target's saved modules",
            )
    problems.raise_any("these experts hold trained modules besides updates and heads")


def start_logits(
    plan: MixturePlan, count: int, request: TuneRequest, chosen: Sequence[Expert], examples: int
) -> list[float]:
    """Logits whose softmax gives the initial weights: the ranking's scores, and 1/N for a component without a score.

    Args:
        count: number of components of the mixture.
        examples: number of labelled examples from which the ranking estimated the gains.
    """
    ranked = _known(request.scores, request, chosen)
    if plan.start_by_gain and (gains := _known(request.gains, request, chosen)):
        ranked = gain_logits(gains, examples)
    own = count - len(chosen) + (1 if plan.target and len(chosen) == count else 0)  # the target's or a fresh one
    if not plan.ranked_start or not ranked or len(ranked) < count - own:
        return [0.0] * count
    # log-mean-exp of the others' scores: a softmax weight of exactly 1/N
    highest = max(ranked)
    middle = highest + math.log(sum(math.exp(score - highest) for score in ranked) / len(ranked))
    return [middle] * own + ranked


def gain_logits(gains: Sequence[float], examples: int) -> list[float]:
    """Expected gains divided by the temperature 0.1 / √examples: with fewer labelled examples, gains are less reliable.

    >>> gain_logits([0.04, 0.0], examples=25)
    [2.0, 0.0]
    """
    return [gain * math.sqrt(examples) / TEMPERATURE for gain in gains]


def _known(values: Sequence[float | None] | None, request: TuneRequest, chosen: Sequence[Expert]) -> list[float]:
    """Select the known values of the chosen experts from the values of the request's experts."""
    by_path = dict(zip((expert.path.resolve() for expert in request.experts), values or [], strict=False))
    found = [by_path.get(expert.path.resolve()) for expert in chosen]
    return [value for value in found if value is not None]


@contextmanager
def form_of(plan: MixturePlan, request: TuneRequest, chosen: Sequence[Expert]) -> Iterator[Expert | None]:
    """Yield an expert that defines the tensors of a mixture without ΔW; None for a mixture of updates ΔW."""
    options = request.options
    if options.fresh_kind is None:
        yield _known_form(plan, request, chosen)
    elif KINDS.load(options.fresh_kind).stores_factors:
        yield None
    else:
        with fresh_expert(options.fresh_kind, request.session, options.fresh_rank, options.fresh_modules) as form:
            yield form


def _known_form(plan: MixturePlan, request: TuneRequest, chosen: Sequence[Expert]) -> Expert | None:
    options = request.options
    form = chosen[0] if chosen else request.like
    if form is None or not form.tensor_sets:
        return None
    if not plan.experts and (options.fresh_rank or options.fresh_modules or options.fresh_alpha):
        return None  # these options ask for a fresh LoRA
    if not plan.experts and not plan.train_experts and not form.has_strength:
        return None  # an untrained fresh prompt would change the base's answers
    if options.rank is not None:
        raise PimergeError(f"--rank is for updates ΔW, and experts of kind {form.kind} have none", "leave it out")
    return form


def tensor_components(
    plan: MixturePlan, request: TuneRequest, form: Expert, chosen: Sequence[Expert]
) -> list[TensorComponent]:
    """Components of a mixture of experts without ΔW; a fresh one comes first."""
    loaded, seed = request.session.loaded, request.options.init_seed

    def random(replaced: TensorComponent, number: int) -> TensorComponent:
        return fresh_component(form, loaded, seed + number, f"random {number}")

    found = [component_of(expert, loaded) for expert in chosen]
    return _with_fresh(plan, request, found, random, lambda: fresh_component(form, loaded, seed))


def lora_components(plan: MixturePlan, request: TuneRequest, chosen: Sequence[Expert]) -> list[LoraComponent]:
    """Components of a mixture of updates ΔW; a fresh one comes first."""
    options, loaded = request.options, request.session.loaded

    def random(replaced: LoraComponent, number: int) -> LoraComponent:
        return fresh_lora_like(replaced, loaded, options.init_seed + number, f"random {number}")

    found = [_component(expert, options.rank, request.note) for expert in chosen]
    return _with_fresh(plan, request, found, random, lambda: _fresh_for(plan, request))


def _with_fresh(
    plan: MixturePlan,
    request: TuneRequest,
    found: list[Component],
    random: Callable[[Component, int], Component],
    fresh: Callable[[], Component],
) -> list[Component]:
    """Replace components by random ones, and put a fresh one first, if the plan says so."""
    if plan.random_experts:
        own = int(plan.target and request.target is not None)  # the target's own expert stays
        found = found[:own] + [random(each, number) for number, each in enumerate(found[own:], 1)]
    without_own = plan.target and request.target is None
    if without_own:
        request.note(NO_EXPERT)
    return ([fresh()] if without_own or plan.fresh else []) + found


def _fresh_for(plan: MixturePlan, request: TuneRequest) -> LoraComponent:
    """Make a fresh LoRA of the size in the options, or of the expert whose form it takes."""
    options, loaded, like = request.options, request.session.loaded, request.like
    modules = tuple(sorted(like.modules)) if like and like.modules else lora_targets(loaded.model)
    like = like if like and like.strategy.stores_factors else None  # other kinds have no rank
    rank = options.fresh_rank or (max(like.ranks) if like else 8)
    alpha = options.fresh_alpha
    if alpha is None:
        alpha = max((module.alpha for module in like.modules.values()), default=float(rank)) if like else float(rank)
        alpha = alpha * rank / max(like.ranks) if like else alpha
    return fresh_lora(
        loaded, rank if plan.train_experts else 1, alpha, options.fresh_modules or modules, options.init_seed
    )


def _component(expert: Expert, rank: int | None, note: Note) -> LoraComponent:
    """Turn an expert into a component; an expert of a kind other than LoRA is converted to a LoRA.

    Args:
        rank: highest rank of a converted expert; None keeps most of ΔW.
    """
    if not expert.is_computed:
        return LoraComponent(expert.name, expert.modules, {name: expert.factors(name) for name in expert.modules})
    truncation = Truncation(rank, None if rank else DEFAULT_ENERGY)
    factors, summaries = {}, []
    for name, module in expert.modules.items():
        found = weighted_sum([expert.factors(name)], [1.0], truncation, torch.float64)
        factors[name] = found.factors
        summaries.append(MergedModule(module, found.factors, found.energy, found.lost).summary)
    note(
        f"'{expert.name}' is of kind {expert.kind}: it becomes a LoRA of rank {max(s.rank for s in summaries)}, "
        f"without {relative_error(summaries):.1%} of its ‖ΔW‖ (--rank N for another rank)"
    )
    return LoraComponent(expert.name, expert.modules, factors)
