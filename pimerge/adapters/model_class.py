"""The task type of an adapter, and the class of model that it is loaded into.

PEFT wraps a model by the adapter's ``task_type``. For a classifier's type, it then expects the head in the file, and
fails to load an adapter without one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from pimerge.adapters.head import Head
from pimerge.checkpoints.base import Base

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Task type → names of the heads that PEFT expects in the file."""
_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_GENERATING = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
_WITHOUT_HEAD = "FEATURE_EXTRACTION"
"""The type with which PEFT puts a prompt before any model."""


def lacks_head(task_type: str | None, head: Mapping[str, Any]) -> bool:
    """Whether PEFT expects a head in the file that is not among these parameters.

    >>> lacks_head("SEQ_CLS", {"classifier.weight": 0}), lacks_head("SEQ_CLS", {}), lacks_head("CAUSAL_LM", {})
    (False, True, False)
    """
    expected = _HEADS.get(task_type or "", ())
    return bool(expected) and not any(f".{name}." in f".{parameter}" for parameter in head for name in expected)


def task_fields(
    like: Mapping[str, Any], head: Mapping[str, Any], *, before_text: bool = False, adapted: Iterable[str] = ()
) -> dict[str, Any]:
    """The fields ``task_type`` and ``auto_mapping`` of an adapter with this head, taken from another's config.

    Args:
        head: parameter names of the head that is written.
        before_text: whether it is a prompt or a prefix, which PEFT puts before a text only with a task type.
        adapted: the modules that the adapter updates. If one is in the head, the type is left out, since PEFT would
            replace the whole head.

    >>> task_fields({"task_type": "SEQ_CLS"}, {})["auto_mapping"]
    {'base_model_class': 'AutoModelForSequenceClassification', 'parent_library': 'transformers'}
    """
    task_type = like.get("task_type")
    whole = _HEADS.get(task_type or "", ())
    is_split = any(f".{name}." in f".{module}." for module in adapted for name in whole)
    if not lacks_head(task_type, head) and not is_split:
        return {"task_type": task_type, "auto_mapping": like.get("auto_mapping")}
    if before_text:
        return {"task_type": _WITHOUT_HEAD, "auto_mapping": None}
    mapping = {"base_model_class": _CLASSES[str(task_type)], "parent_library": "transformers"}
    return {"task_type": None, "auto_mapping": mapping}


def loading_code(like: Mapping[str, Any], base: Base, reference: str, head: Head) -> str:
    """Python code that loads an adapter into its base.

    Args:
        like: the config from which the adapter's task type was taken.
        reference: the base's name or path in the adapter's config.
    """
    library, name = _model_class(like, base)
    note = "  # or the Auto class of your task" if name == "AutoModel" else ""
    labels = min((len(value) for key, value in head.tensors.items() if _is_classifier(key)), default=0)
    classes = f", num_labels={labels}" if labels else ""
    return f"""
from peft import PeftModel
from {library} import {name}{note}

base = {name}.from_pretrained({json.dumps(reference or "path/to/the/base")}{classes})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
"""


def loading_classes(config: Mapping[str, Any]) -> list[str]:
    """The classes of transformers that an adapter's config names, by its task type or by ``auto_mapping``.

    >>> loading_classes({"task_type": "CAUSAL_LM"})
    ['AutoModelForCausalLM']
    """
    mapping = config.get("auto_mapping")
    own = [str(mapping.get("base_model_class"))] if isinstance(mapping, dict) else []
    known = _CLASSES | _GENERATING
    return [*own, *([known[config["task_type"]]] if config.get("task_type") in known else [])]


def _model_class(like: Mapping[str, Any], base: Base) -> tuple[str, str]:
    """Library and class of the base's model."""
    task_type, mapping = like.get("task_type") or "", like.get("auto_mapping")
    if task_type in _CLASSES:
        return "transformers", _CLASSES[task_type]
    if not task_type and isinstance(mapping, dict):
        library = str(mapping.get("parent_library")).partition(".")[0]
        if library in ("transformers", "diffusers"):
            return library, str(mapping.get("base_model_class"))
    found: Any = None
    if base.folder is not None:
        with suppress(OSError, ValueError, TypeError, LookupError):
            found = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    return "transformers", str(found or _GENERATING.get(task_type, "AutoModel"))


def _is_classifier(parameter: str) -> bool:
    return any(f".{name}." in f".{parameter}" for name in _HEADS["SEQ_CLS"])
