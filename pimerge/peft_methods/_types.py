"""Add members to PEFT's enumeration of types."""

from __future__ import annotations

from typing import Any

from peft import PeftType


def peft_type(name: str) -> Any:
    """The member of ``PeftType`` of a name, added if it is not there.

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
