"""Shared by the methods: their PEFT type, config and tuner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from torch import nn


def peft_type(name: str) -> Any:
    """The member of ``PeftType`` with a name; it is added if missing, which an enumeration does not offer.

    >>> peft_type("LORA") is PeftType.LORA
    True
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


@dataclass
class TargetedConfig(PeftConfig):  # type: ignore[misc]
    """A config whose adapters are placed in target modules; its fields are those of PEFT's own configs."""

    method: ClassVar[str]
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(self.method)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class TargetedTuner(BaseTuner):  # type: ignore[misc]
    """A tuner that replaces each target module by its layer; see :meth:`_new_layer`."""

    def _new_layer(self, target: nn.Module, adapter_name: str, config: Any, name: str) -> nn.Module:
        """The layer around a target module of a name."""
        raise NotImplementedError

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        layer = self._new_layer(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
