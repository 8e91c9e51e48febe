"""Files in an expert's folder."""

from __future__ import annotations

from pathlib import Path

from pimerge.checkpoints.checkpoint import INDEX, UNPICKLE, open_shards, read_object
from pimerge.checkpoints.safetensors_file import TensorFile, joined, open_tensors
from pimerge.core.errors import PimergeError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TASK = "task.json"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")


def looks_like_expert(folder: Path) -> bool:
    """Whether a folder holds an adapter's config or weights."""
    return folder.is_dir() and ((folder / CONFIG).exists() or has_weights(folder))


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of an adapter under PEFT's names."""
    return any((folder / name).exists() for name in (WEIGHTS, WEIGHTS + INDEX, *_PICKLES[:3]))


def tensors_of(path: Path) -> TensorFile:
    """Open the expert's tensors, in one file or in shards with an index; only headers are read."""
    file, index = path / WEIGHTS, path / (WEIGHTS + INDEX)
    if file.is_file():
        return open_tensors(file)
    if index.is_file():
        return joined(index, open_shards(path, index.name, read_object(index)))
    pickle = next((name for name in _PICKLES if (path / name).is_file()), None)
    if pickle:
        raise PimergeError(
            f"'{path / pickle}' is a pickle, which can run code when it is read; only {WEIGHTS} is read",
            UNPICKLE.format(path),
        )
    raise PimergeError(f"'{file}' does not exist", "save the adapter with PEFT: model.save_pretrained(FOLDER)")
