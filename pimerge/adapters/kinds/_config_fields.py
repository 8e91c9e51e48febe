"""The fields of ``adapter_config.json`` that every kind reads, and their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pimerge.core.errors import Problems


class CommonFields(BaseModel):
    """The fields of ``adapter_config.json`` that every kind reads, with their types."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    base_model_name_or_path: str | None = None
    revision: str | None = None
    modules_to_save: list[str] | None = None


def faulty_fields(fields: type[BaseModel], config: Mapping[str, Any], problems: Problems) -> set[Any]:
    """The fields of a wrong type, each of which is a problem."""
    faulty = set()
    try:
        fields.model_validate(config)
    except ValidationError as error:
        for fault in error.errors():
            faulty.add(fault["loc"][0])
            where = ".".join(str(part) for part in fault["loc"])
            problems.add(f"{where} in adapter_config.json: {fault['msg']}", "save the adapter again with PEFT")
    return faulty
