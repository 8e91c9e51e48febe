"""Kinds of expert that PEFT does not ship, ``bitfit`` and ``bottleneck``, registered with it by importing this package.

After ``import pimerge.peft_methods``, ``get_peft_model``, ``save_pretrained`` and ``PeftModel.from_pretrained`` know
them.
"""

from __future__ import annotations

from peft.utils import register_peft_method

from pimerge.peft_methods._types import peft_type
from pimerge.peft_methods.bitfit import BitFitConfig, BitFitModel
from pimerge.peft_methods.bottleneck import BottleneckConfig, BottleneckModel

__all__ = ["BitFitConfig", "BitFitModel", "BottleneckConfig", "BottleneckModel"]


for name, config, model in (("bitfit", BitFitConfig, BitFitModel), ("bottleneck", BottleneckConfig, BottleneckModel)):
    peft_type(name.upper())
    register_peft_method(name=name, config_cls=config, model_cls=model)
