"""Check the types of the fields in ``adapter_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pimerge.core.errors import Problems


class CommonFields(BaseModel):
    """The fields that every kind reads."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    base_model_name_or_path: str | None = None
    revision: str | None = None
    modules_to_save: list[str] | None = None


def faulty_fields(fields: type[BaseModel], config: Mapping[str, Any], problems: Problems) -> set[Any]:
    """Return the fields of a wrong type, and add a problem for each."""
    faulty = set()
    try:
        fields.model_validate(config)
    except ValidationError as error:
        for fault in error.errors():
            faulty.add(fault["loc"][0])
            where = ".".join(str(part) for part in fault["loc"])
            problems.add(f"{where} in adapter_config.json: {fault['msg']}", "save the adapter again with PEFT")
    return faulty
