"""Put experts into a base model with PEFT, and remove them again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pimerge.adapters.additive_tensors import sum_of
from pimerge.adapters.bare_parameter import Packing, bare_names, is_by_expert, target_ranks
from pimerge.adapters.base_fit import check_fits
from pimerge.adapters.compatibility import require_alike
from pimerge.adapters.expert import Expert
from pimerge.adapters.keys import PREFIX, PROMPT_PREFIX, is_saved, parameter_of
from pimerge.adapters.lora_fields import rank_fields
from pimerge.adapters.lora_module import Factors
from pimerge.adapters.merged_module import MergedModule
from pimerge.adapters.peft_folder import peft_folder
from pimerge.core.errors import PimergeError
from pimerge.core.hf_loading import load_adapter, load_adapter_config
from pimerge.models.loaded_base import LoadedBase

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor


@contextmanager
def injected(expert: Expert, loaded: LoadedBase) -> Iterator[nn.Module]:
    """Put an expert and its head into a base: yield PEFT's model in eval mode, then restore the base."""
    from pimerge import peft_methods  # noqa: F401  PEFT has to know every kind

    check_fits(expert, loaded.model)
    modules = expert.modules.values()
    if is_by_expert(modules) or (bare_names(modules) and not expert.config.get("target_parameters")):
        why = "in Unsloth's order" if is_by_expert(modules) else "under the names of an earlier version of the model"
        raise PimergeError(
            f"'{expert.name}' stores the updates of a mixture's experts {why}, which PEFT does not read in every model",
            f"write them as PEFT does first: pimerge merge {expert.path} --output FOLDER",
        )
    saved = expert.config.get("modules_to_save") or []
    replaced = {parameter_of(name) for name in expert.head if not is_saved(name, saved)} | expert.biases.keys()
    own = [tensor for name, tensor in loaded.model.named_parameters() if name in replaced]
    with modules_restored(loaded.model), tensors_restored(own), peft_folder(expert) as folder:
        yield load_adapter(loaded.model, folder).eval()


def peft_prefix(model: nn.Module) -> str:
    """The prefix of the base's module names in PEFT's model; empty for a plain model."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return ""
    return PROMPT_PREFIX if model.active_peft_config.is_prompt_learning else PREFIX


@contextmanager
def injected_sum(experts: Sequence[Expert], weights: Sequence[float], loaded: LoadedBase) -> Iterator[nn.Module]:
    """Put W0 + Σ w_n ΔW_n under the base's own head: yield PEFT's model in eval mode, then restore the base.

    Experts without ΔW are summed elementwise, see :mod:`pimerge.adapters.additive_tensors`.

    Args:
        experts: experts, each at its own strength.
        weights: one weight per expert.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    for expert in experts:
        check_fits(expert, loaded.model, head=False)
        if expert.biases:
            raise PimergeError(
                f"'{expert.name}' holds trained biases of the base (bias is '{expert.config.get('bias')}'), and only "
                "updates of layers can be summed here",
                "merge it instead (pimerge merge), or train one with bias='none' (lora_bias=True is accepted)",
            )
    require_alike(experts)
    if len({bare_names(expert.modules.values()) for expert in experts} - {frozenset()}) > 1:
        raise PimergeError(
            "the experts adapt different parameters (target_parameters), which PEFT cannot load together",
            "merge them instead (pimerge merge), or leave some out",
        )
    if experts[0].tensor_sets:
        tensors = sum_of(experts, weights, loaded.model.get_parameter)
        with modules_restored(loaded.model):
            adapted = fresh_adapter_like(experts[0], loaded.model)
            key_of = experts[0].strategy.key_of_parameter
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if key_of(name) in tensors:
                        parameter.copy_(tensors[key_of(name)])
            yield adapted
        return
    with modules_restored(loaded.model):
        model: Any = None
        names = [f"expert{index}" for index in range(len(experts))]
        strength = {}
        for name, expert, weight in zip(names, experts, weights, strict=True):
            config, tensors, scale = _as_lora(expert, loaded.model)
            strength[name] = weight * scale
            config.modules_to_save = config.task_type = None  # a task type adds modules to save
            config.inference_mode = True
            if model is None:
                model = PeftModel(loaded.model, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
            set_peft_model_state_dict(model, tensors, adapter_name=name)
        model.base_model.set_adapter(names)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling.update({name: strength[name] * value for name, value in layer.scaling.items()})
        yield model.eval()


def _as_lora(expert: Expert, base_model: nn.Module) -> tuple[PeftConfig, dict[str, Tensor], float]:
    """Convert an expert to a LoRA: PEFT's config, its tensors, and the strength that they do not include."""
    from peft import LoraConfig

    if all(module.is_plain for module in expert.modules.values()):
        keys = expert.file.entries.keys() - set(expert.head.values())
        tensors = {key: expert.tensor(key) for key in sorted(keys)}
        with peft_folder(expert) as folder:
            return load_adapter_config(folder, base_model), tensors, expert.strength
    ranks = {name: module.rank for name, module in expert.modules.items()}
    modules = list(expert.modules.values())
    fields = rank_fields(target_ranks(modules, ranks), parameters=bare_names(modules))
    config = LoraConfig(**fields, fan_in_fan_out=bool(expert.config.get("fan_in_fan_out")))
    packing, tensors = Packing(modules), {}
    for name, module in expert.modules.items():
        factors = expert.factors(name)
        plain = Factors(factors.A.float(), (factors.scaling * factors.B).float(), 1.0)
        tensors |= packing.add(MergedModule(module, plain))
    return config, tensors, 1.0


def fresh_adapter_like(expert: Expert, base_model: nn.Module) -> nn.Module:
    """Put a fresh adapter shaped like an expert under the base's own head: PEFT's model in eval mode."""
    from peft import PeftModel, get_peft_model

    from pimerge import peft_methods  # noqa: F401  PEFT has to know every kind

    with peft_folder(expert) as folder:
        config = load_adapter_config(folder, base_model)
    config.inference_mode = True
    model: nn.Module
    if config.is_prompt_learning:  # the model class of its task type inserts the prompt
        model = get_peft_model(base_model, config)
    else:
        config.modules_to_save = config.task_type = None  # a task type adds modules to save
        model = PeftModel(base_model, config)
    return model.eval()


@contextmanager
def modules_restored(base_model: nn.Module) -> Iterator[None]:
    """Remove everything that PEFT puts into a base during the block."""
    before, attributes = dict(base_model.named_modules()), set(vars(base_model))
    try:
        yield
    finally:
        for name in vars(base_model).keys() - attributes:  # PEFT would reuse the adapters recorded there
            delattr(base_model, name)
        for name, module in before.items():  # PEFT's unload would keep an expert's head
            if base_model.get_submodule(name) is not module:
                base_model.set_submodule(name, module)
        base_model.requires_grad_(False)


@contextmanager
def tensors_restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore values and dtypes of parameters and buffers after the block, frozen and without gradients."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in before:
            tensor.requires_grad_(False)
            tensor.grad = None
            tensor.data = value
