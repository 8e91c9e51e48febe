"""Read JSON documents into pydantic models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pimerge.core.errors import Problems, nearest
from pimerge.core.files import read_json

Document = TypeVar("Document", bound=BaseModel)


def parse_document(model: type[Document], path: Path, hint: str = "") -> Document:
    """Read a JSON file into a model; all invalid fields are reported at once."""
    return validated(model, read_json(path, hint), f"'{path}'", hint)


def validated(model: type[Document], content: Any, where: str, hint: str = "") -> Document:
    """Validate a document's content against a model; all invalid fields are reported at once.

    Args:
        where: name of the document in messages.
        hint: what the user can do about an invalid field.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = Problems()
        for fault in error.errors():
            field = ".".join(str(part) for part in fault["loc"]) or "the document"
            fix = hint
            if fault["type"] == "extra_forbidden":
                fix = nearest(str(fault["loc"][-1]), list(model.model_fields))
            problems.add(f"{where}: {field}: {fault['msg']}", fix)
        problems.raise_any(f"{where} is not valid")
        raise AssertionError("unreachable: a problem was raised") from error
