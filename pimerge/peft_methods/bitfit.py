"""BitFit for PEFT: trained biases in place of the base's (arXiv 2106.10199)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from pimerge.checkpoints.architecture import layers_within
from pimerge.peft_methods._shared import TargetedConfig, TargetedTuner


@dataclass
class BitFitConfig(TargetedConfig):
    """The modules whose biases are trained.

    Attributes:
        target_modules: names or name endings of modules with a bias, or a regular expression; by default every module
            with a bias outside the head.
        exclude_modules, modules_to_save: as in PEFT's own configs.
    """

    method: ClassVar[str] = "BITFIT"


class BitFitLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A layer of the base with a trained bias."""

    adapter_layer_names = ("bitfit_bias",)
    active_adapters: list[str]
    set_adapter: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BitFitConfig) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.bitfit_bias = nn.ParameterDict({})
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BitFitConfig) -> None:
        """Add an adapter that starts from the base's bias."""
        self.bitfit_bias[adapter_name] = nn.Parameter(self.base_layer.bias.detach().clone())
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base's layer with the active adapter's bias."""
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.bitfit_bias]
        if len(active) > 1:
            raise ValueError(f"a layer has one bias, but {len(active)} adapters are active")
        replaced = {"bias": self.bitfit_bias[active[0]]} if active else {}
        output: Tensor = functional_call(self.base_layer, replaced, args, kwargs)
        return output

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Swap the adapter's bias into the base."""
        for name in adapter_names or self.active_adapters:
            own, bias = self.base_layer.bias, self.bitfit_bias[name]
            own.data, bias.data = bias.data, own.data
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Swap the base's bias back."""
        while self.merged_adapters:
            own, bias = self.base_layer.bias, self.bitfit_bias[self.merged_adapters.pop()]
            own.data, bias.data = bias.data, own.data


class BitFitModel(TargetedTuner):
    """A model with trained biases."""

    prefix = "bitfit_"
    tuner_layer_cls = BitFitLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: BitFitConfig, model_config: dict[str, Any]) -> BitFitConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = biased_modules(self.model, peft_config.modules_to_save or ())
        return peft_config

    def _new_layer(self, target: nn.Module, adapter_name: str, config: BitFitConfig, name: str) -> nn.Module:
        if getattr(target, "bias", None) is None:
            raise ValueError(f"'{name}' has no bias: name modules that have one in target_modules")
        return BitFitLayer(target, adapter_name, config)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Do nothing: a bias keeps the dtype of its layer."""


def biased_modules(model: nn.Module, head: Iterable[str]) -> set[str]:
    """The names of the modules with a bias outside the head; a ValueError if there is none."""
    found = {
        name
        for name, module in layers_within(model).items()
        if isinstance(getattr(module, "bias", None), nn.Parameter)
        and not any(f"{saved}." in f"{name}." for saved in head)  # as PEFT matches modules_to_save
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no biases, so BitFit has nothing to train")
    return found
