"""Two PEFT methods that PEFT does not ship, ``bitfit`` and ``bottleneck``; importing this package registers them.

After ``import pimerge.peft_methods``, ``get_peft_model``, ``save_pretrained`` and ``PeftModel.from_pretrained`` support
them.
"""

from __future__ import annotations

from peft.utils import register_peft_method

from pimerge.peft_methods._shared import peft_type
from pimerge.peft_methods.bitfit import BitFitConfig, BitFitModel
from pimerge.peft_methods.bottleneck import BottleneckConfig, BottleneckModel

__all__ = ["BitFitConfig", "BitFitModel", "BottleneckConfig", "BottleneckModel"]


for name, config, model in (("bitfit", BitFitConfig, BitFitModel), ("bottleneck", BottleneckConfig, BottleneckModel)):
    peft_type(name.upper())
    register_peft_method(name=name, config_cls=config, model_cls=model)
