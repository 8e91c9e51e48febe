"""Name the program that wrote an adapter which pimerge does not read, and how to convert it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pimerge.adapters.expert_files import CONFIG, has_weights
from pimerge.core.errors import PimergeError
from pimerge.core.files import read_json


@dataclass(frozen=True)
class Writer:
    """A program whose files pimerge does not read.

    Attributes:
        wrote: config, file names → whether it wrote them.
        what: what the files are, after their path.
        hint: how to convert them.
    """

    wrote: Callable[[Mapping[str, Any], frozenset[str]], bool]
    what: str
    hint: str


_ADAPTER_HUB = Writer(
    lambda config, names: (
        "peft_type" not in config
        and "config" in config
        and ("model_class" in config or "model_type" in config or "pytorch_adapter.bin" in names)
    ),
    "was written by the library 'adapters' (AdapterHub), whose adapters PEFT cannot load either",
    "merge it into its base with that library (model.merge_adapter, then model.save_pretrained(FOLDER)), and make a "
    "LoRA of the result: pimerge extract FOLDER --base BASE",
)
_GGUF = Writer(
    lambda config, names: any(name.endswith(".gguf") for name in names),
    "is GGUF of llama.cpp, which is converted for inference",
    "use the adapter's folder of PEFT from which it was converted",
)
_NEEDS_BASE = ("full", "dora")
_MLX_FULL = Writer(
    lambda config, names: config.get("fine_tune_type") in _NEEDS_BASE and "adapters.safetensors" in names,
    "was written by mlx-lm with fine_tune_type 'full' or 'dora', which needs the base's weights",
    "fuse it into its base with mlx_lm.fuse, and merge the full checkpoints with --base",
)
_LEROBOT = Writer(
    lambda config, names: set(config) == {"base_model"},
    "has an adapter_config.json that holds only base_model, as LeRobot writes it beside a policy",
    "save the adapter with PEFT, which states peft_type, r and alpha: policy.save_pretrained(FOLDER)",
)
_WRITERS = (_ADAPTER_HUB, _MLX_FULL, _LEROBOT, _GGUF)


def refuse_other_writers(path: Path) -> None:
    """Refuse a folder or a file of a program whose adapters pimerge does not read, naming the program."""
    if path.is_file():
        names, config = frozenset({path.name}), {}
    else:
        names, config = frozenset(each.name for each in path.iterdir()), _config(path)
        if has_weights(path) and "peft_type" in config:
            return
    writer = next((each for each in _WRITERS if each.wrote(config, names)), None)
    if writer is not None:
        raise PimergeError(f"'{path}' {writer.what}", writer.hint)


def _config(folder: Path) -> dict[str, Any]:
    """The config of a folder; empty if it has none or it cannot be read, which is reported when it is opened."""
    try:
        found = read_json(folder / CONFIG)
    except PimergeError:
        return {}
    return found if isinstance(found, dict) else {}
