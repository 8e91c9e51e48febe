"""The components of a mixture: the chosen experts, the target's own, and fresh ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from pimerge.adapters.compatibility import require_alike, require_finite
from pimerge.adapters.expert import Expert
from pimerge.adapters.kind import KINDS, AdapterHeader
from pimerge.adapters.kinds.lora import parse
from pimerge.adapters.low_rank import DEFAULT_ENERGY, Truncation, weighted_sum
from pimerge.adapters.merged_module import MergedModule, relative_error
from pimerge.checkpoints.architecture import inside, lora_targets
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.progress import Note
from pimerge.models.loaded_base import LoadedBase, in_head
from pimerge.tuning.fresh_expert import fresh_expert
from pimerge.tuning.lora_layers import LoraComponent
from pimerge.tuning.method import TuneMethod
from pimerge.tuning.plan import MixturePlan
from pimerge.tuning.session import TuneRequest
from pimerge.tuning.tensor_layers import TensorComponent, component_of, fresh_component

TEMPERATURE = 0.1
"""Temperature of the softmax of expected gains with one labelled example; it falls with the gains' standard error."""
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
    """Refuse experts that have more than updates and a head, since nothing else is summed or trained."""
    problems = Problems()
    for expert in {expert.path: expert for expert in experts}.values():
        stray = sorted({name.rpartition(".")[0] for name in expert.head if not in_head(name, loaded.head)})
        if stray:
            problems.add(
                f"'{expert.name}' has trained {', '.join(stray)} of the base (modules_to_save), which is not a head "
                "and would be lost",
                "leave it out, or merge instead: pimerge merge keeps what the target saved",
            )
    problems.raise_any("these experts are more than updates and heads")


def start_logits(
    plan: MixturePlan, count: int, request: TuneRequest, chosen: Sequence[Expert], examples: int
) -> list[float]:
    """Logits whose softmax the weights start from: the scores, and 1/N for a component without one.

    Args:
        count: how many components the mixture has.
        examples: how many labelled ones the ranking's gains rest on.
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
    """Expected gains over the temperature 0.1 / √examples: the fewer labelled examples, the less reliable the gains.

    >>> gain_logits([0.04, 0.0], examples=25)
    [2.0, 0.0]
    """
    return [gain * math.sqrt(examples) / TEMPERATURE for gain in gains]


def _known(values: Sequence[float | None] | None, request: TuneRequest, chosen: Sequence[Expert]) -> list[float]:
    """Select the values of the chosen experts from those of all the request's experts."""
    by_path = dict(zip((expert.path.resolve() for expert in request.experts), values or [], strict=False))
    found = [by_path.get(expert.path.resolve()) for expert in chosen]
    return [value for value in found if value is not None]


@contextmanager
def form_of(plan: MixturePlan, request: TuneRequest, chosen: Sequence[Expert]) -> Iterator[Expert | None]:
    """An expert whose form the mixture has, if it is of a kind without ΔW; None for LoRA."""
    options, session = request.options, request.session
    kind = options.fresh_kind
    if kind is None:
        yield _known_form(plan, request, chosen)
    elif KINDS.load(kind).stores_factors:
        yield None
    else:
        with fresh_expert(
            kind, session.loaded, session.base, session.task, options.fresh_rank, options.fresh_modules
        ) as form:
            yield form


def _known_form(plan: MixturePlan, request: TuneRequest, chosen: Sequence[Expert]) -> Expert | None:
    options = request.options
    form = chosen[0] if chosen else request.like
    if form is None or not form.tensor_sets:
        return None
    if not plan.experts and (options.fresh_rank or options.fresh_modules or options.fresh_alpha):
        return None  # a fresh LoRA is asked for
    if not plan.experts and not plan.train_experts and not form.has_strength:
        return None  # a fresh prompt that is not trained would change the base
    if options.rank is not None:
        raise PimergeError(f"--rank is for updates ΔW, and experts of kind {form.kind} have none", "leave it out")
    return form


def tensor_components(
    plan: MixturePlan, request: TuneRequest, form: Expert, chosen: Sequence[Expert]
) -> list[TensorComponent]:
    """The components of a mixture of experts without ΔW, a fresh one first."""
    loaded, seed = request.session.loaded, request.options.init_seed
    found = [component_of(expert, loaded) for expert in chosen]
    if plan.random_experts:
        own = found[: plan.target and request.target is not None]
        found = own + [
            fresh_component(form, loaded, seed + number, f"random {number}")
            for number in range(1, len(found) - len(own) + 1)
        ]
    return [fresh_component(form, loaded, seed), *found] if _needs_fresh(plan, request) else found


def lora_components(plan: MixturePlan, request: TuneRequest, chosen: Sequence[Expert]) -> list[LoraComponent]:
    """The components of a mixture of updates ΔW, a fresh one first."""
    options, loaded = request.options, request.session.loaded
    found = [_component(expert, options.rank, request.note) for expert in chosen]
    if plan.random_experts:
        own = found[: plan.target and request.target is not None]
        found = own + [
            _random_like(component, loaded, options.init_seed + number, f"random {number}")
            for number, component in enumerate(found[len(own) :], 1)
        ]
    return [_fresh_for(plan, request), *found] if _needs_fresh(plan, request) else found


def _needs_fresh(plan: MixturePlan, request: TuneRequest) -> bool:
    if plan.target and request.target is None:
        request.note(NO_EXPERT)
        return True
    return plan.fresh


def _fresh_for(plan: MixturePlan, request: TuneRequest) -> LoraComponent:
    """A fresh LoRA of the size that the options ask for, else that of the expert it shall be like."""
    options, loaded, like = request.options, request.session.loaded, request.like
    places = tuple(sorted(like.modules)) if like and like.modules else lora_targets(loaded.model)
    like = like if like and like.strategy.stores_factors else None  # others have no rank
    rank = options.fresh_rank or (max(like.ranks) if like else 8)
    alpha = options.fresh_alpha
    if alpha is None:
        alpha = max((module.alpha for module in like.modules.values()), default=float(rank)) if like else float(rank)
        alpha = alpha * rank / max(like.ranks) if like else alpha
    return fresh_lora(
        loaded, rank if plan.train_experts else 1, alpha, options.fresh_modules or places, options.init_seed
    )


def fresh_lora(
    loaded: LoadedBase, rank: int, alpha: float, modules: Sequence[str] | None, seed: int, name: str = "fresh"
) -> LoraComponent:
    """Make a fresh LoRA expert with PEFT's own init (A Kaiming-uniform, B zero); the base is unchanged afterwards.

    Args:
        modules: names or name endings; None for those that PEFT adapts in this architecture.
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
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    layouts, _ = parse(AdapterHeader({"r": rank, "lora_alpha": alpha}, shapes))
    factors = {module: layout.factors(lambda key: tensors[key].float()) for module, layout in layouts.items()}
    return LoraComponent(name, layouts, factors)


def _random_like(component: LoraComponent, loaded: LoadedBase, seed: int, name: str) -> LoraComponent:
    """A fresh LoRA on the modules of another, of its highest rank."""
    rank = max(module.rank for module in component.modules.values())
    alpha = rank * max(factors.scaling for factors in component.factors.values())
    return fresh_lora(loaded, rank, alpha, sorted(component.modules), seed, name)


def _component(expert: Expert, rank: int | None, note: Note) -> LoraComponent:
    """An expert as a component; an expert of another kind than LoRA becomes a LoRA.

    Args:
        rank: the highest that it then has; None for one that keeps most of ΔW.
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
