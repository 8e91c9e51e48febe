"""Load base models for a task."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pimerge.checkpoints.architecture import heads_of
from pimerge.checkpoints.base import Base
from pimerge.core.errors import PimergeError
from pimerge.core.hf_loading import load_config, load_model, require_safetensors
from pimerge.models.loaded_base import LoadedBase, in_head
from pimerge.tasks.task import Task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def resolve_device(device: str) -> torch.device:
    """Resolve a device; ``auto`` is the first GPU if there is one, otherwise the CPU.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise PimergeError(f"the device '{device}' cannot be used: {reason}", "try --device cpu") from error
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Resolve a dtype; ``auto`` is bfloat16 on a GPU and float32 on the CPU.

    >>> resolve_dtype("auto", torch.device("cpu"))
    torch.float32
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise PimergeError(f"--dtype must be one of auto, {', '.join(DTYPES)}; got '{dtype}'")
    return DTYPES[dtype]


def load_base(base: Base, task: Task, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LoadedBase:
    """Load a base model, with a head for the task's labels if the task trains one; remote code is never run.

    Args:
        seed: seed for weights that the checkpoint lacks, such as the head.
    """
    import transformers

    base.require_reachable()
    if base.folder is not None:
        require_safetensors(base.folder)
    quiet_libraries()
    trains_head = task.type.trains_head
    torch.manual_seed(seed)
    try:
        config = load_config(base.source, base.revision)
        model, info = load_model(
            getattr(transformers, task.type.auto_model_for(config)),
            base.source,
            base.revision,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **(_classes(task.labels) if trains_head else {}),
        )
        processor = task.type.load_processor(base.source, base.revision)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise _not_loaded(base, task, str(error)) from error
    padding = getattr(getattr(processor, "tokenizer", processor), "pad_token_id", None)
    if padding is not None and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = padding
    missing = set(info["missing_keys"])
    if missing and not trains_head:
        raise PimergeError(
            f"the base model '{base.name}' has no weights for {', '.join(sorted(missing)[:5])}, "
            f"so it cannot answer in text ({task.file.type})",
            "use a base that was trained as a language model",
        )
    head = _head_modules(model, missing) if trains_head else ()
    stray = sorted(key for key, *_ in info["mismatched_keys"] if not in_head(key, head))
    if stray:
        raise PimergeError(
            f"the base model '{base.name}' does not fit its own config: {', '.join(stray[:5])}",
            "download or save the base again",
        )
    replaced = missing | {key for key, *_ in info["mismatched_keys"]}
    own = sorted((getattr(config, "id2label", None) or {}).items()) if trains_head else []
    own_labels = () if any(in_head(key, head) for key in replaced) else tuple(str(name) for _, name in own)
    has_own_head = not trains_head or list(own_labels) == task.labels
    if not trains_head:
        for part in (model.config, model.config.get_text_config()):
            part.use_cache = False  # only generation needs a cache, and enables it
    model.requires_grad_(False)
    fresh = frozenset(key for key in replaced if in_head(key, head))
    return LoadedBase(model.to(device).eval(), processor, head, has_own_head, fresh, own_labels)


def quiet_libraries() -> None:
    """Turn off the libraries' progress bars, reports and warnings; errors are still shown."""
    import transformers

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it misses a kernel on CPUs
    warnings.filterwarnings("ignore", module=r"(accelerate|datasets|peft|torch|transformers)\b")


def _not_loaded(base: Base, task: Task, message: str) -> PimergeError:
    """Turn an error of transformers into a PimergeError."""
    where = "a folder" if base.folder else f"the Hub id, revision {base.revision or 'main'}"
    reason = message.strip().partition("\n")[0]
    hint = "check the base's folder or Hub id, or pass --base"
    if "trust_remote_code" in message:  # of a tokenizer or an image processor
        hint = "it needs code of its own, which pimerge never runs: choose a base that transformers knows"
    if "model.safetensors" in message:
        hint = f"it may hold pickles only: hf download {base.name} --local-dir FOLDER, pimerge convert FOLDER -o NEW"
    if needed := re.search(r"requires the (\S+) library", message):  # such as Qwen2-VL's processor of videos
        reason, hint = f"it {needed[0]}", f"install {needed[1].lower()} (pip install {needed[1].lower()})"
    return PimergeError(f"the base model '{base.name}' ({where}) cannot be loaded for {task.file.type}: {reason}", hint)


def _classes(labels: Sequence[str]) -> dict[str, Any]:
    """The config fields for a head's classes."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: index for index, name in enumerate(labels)},
    }


class Bases:
    """A cache of one base, for consecutive experts of the same base.

    Attributes:
        checked: forms of experts for which this run has compared the fast Fisher with the loop.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.checked: set[tuple[object, ...]] = set()
        self._key: tuple[str, str, int] | None = None
        self._labels: tuple[str, ...] = ()
        self._loaded: LoadedBase | None = None

    def load(self, base: Base, task: Task) -> LoadedBase:
        """The base, with a head for the task's labels; see :func:`load_base`."""
        labels = tuple(task.labels) if task.type.trains_head else ()
        key = (base.identity, task.file.type, len(labels))
        renamed = self._loaded is not None and self._loaded.own_labels and self._labels != labels
        if self._loaded is None or self._key != key or renamed:
            self._loaded = None  # never keep two bases in memory
            self._loaded = load_base(base, task, self.device, self.dtype)
            self._key, self._labels = key, labels
        return self._loaded


def _head_modules(model: nn.Module, missing: set[str]) -> tuple[str, ...]:
    """Names of the modules outside the architecture's body, and of modules without weights in the checkpoint."""
    names = heads_of(model)
    for key in sorted(missing):
        module = key.rpartition(".")[0]
        if module and not in_head(key, tuple(names)):
            names.append(module)
    return tuple(names)
