"""Fresh, untrained experts with PEFT's own init."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from pimerge.adapters.base_fit import check_fits
from pimerge.adapters.computed_module import as_tensor_sets
from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.kind import KINDS, AdapterHeader
from pimerge.adapters.kinds.lora import parse
from pimerge.checkpoints.architecture import inside
from pimerge.core.errors import PimergeError
from pimerge.models.injection import modules_restored
from pimerge.models.loaded_base import LoadedBase
from pimerge.tuning.lora_layers import LoraComponent
from pimerge.tuning.session import TuningSession

_OTHER_KIND = "use another --kind"


@contextmanager
def fresh_expert(
    kind: str, session: TuningSession, size: int | None = None, modules: Sequence[str] | None = None
) -> Iterator[Expert]:
    """Make a fresh expert of a kind other than LoRA in a temporary folder, and leave the base unchanged.

    Args:
        kind: a kind that computes ΔW from other parameters yields these parameters as tensor sets.
        size: bottleneck size, or number of vectors of a prefix or prompt; None uses PEFT's default.
        modules: names or name endings; None uses the modules that PEFT adapts in this architecture.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model

    from pimerge import peft_methods  # noqa: F401  PEFT has to know every kind

    loaded, task, strategy = session.loaded, session.task, KINDS.load(kind)
    if strategy.fresh_fields is None:
        raise PimergeError(f"no fresh expert of kind {kind} can be made", _OTHER_KIND)
    if strategy.before_text and task.type.peft_task is None:
        raise PimergeError(
            f"a {kind} is put before a text, but {type(loaded.model).__name__} reads no text", _OTHER_KIND
        )
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[strategy.peft_type]
    fields = {
        "task_type": task.type.peft_task_for(loaded.config),
        **({"exclude_modules": inside(loaded.head)} if hasattr(config_class, "exclude_modules") else {}),
        **strategy.usual_places(loaded.model),
        **strategy.fresh_fields(size, modules),
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            with modules_restored(loaded.model):
                adapted = get_peft_model(loaded.model, config_class(**fields))
                adapted.save_pretrained(folder, save_embedding_layers=False)
        except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise PimergeError(
                f"a fresh expert of kind {kind} cannot be put into {type(loaded.model).__name__}: {reason}",
                "name layers with --modules, or use another --kind",
            ) from error
        expert = open_expert(folder, session.base.reference)
        if expert.is_computed:
            expert = replace(expert, tensor_sets=as_tensor_sets(expert.modules), modules={})
        try:
            check_fits(expert, loaded.model, head=False)
        except PimergeError as error:
            reason = "; ".join(problem.message for problem in error.problems)
            raise PimergeError(
                f"a fresh expert of kind {kind} has no place in {type(loaded.model).__name__}: {reason}", _OTHER_KIND
            ) from error
        yield expert


def fresh_lora(
    loaded: LoadedBase, rank: int, alpha: float, modules: Sequence[str] | None, seed: int, name: str = "fresh"
) -> LoraComponent:
    """Make a fresh LoRA with PEFT's own init (A Kaiming-uniform, B zero); afterwards the base is unchanged.

    Args:
        modules: names or name endings; None uses the modules that PEFT adapts in this architecture.
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


def fresh_lora_like(component: LoraComponent, loaded: LoadedBase, seed: int, name: str) -> LoraComponent:
    """Make a fresh LoRA on the modules of another component, with its highest rank."""
    rank = max(module.rank for module in component.modules.values())
    alpha = rank * max(factors.scaling for factors in component.factors.values())
    return fresh_lora(loaded, rank, alpha, sorted(component.modules), seed, name)
