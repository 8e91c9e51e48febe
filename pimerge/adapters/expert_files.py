"""Files in an expert's folder, and the experts in a pool."""

from __future__ import annotations

from pathlib import Path

from pimerge.checkpoints.checkpoint import INDEX, UNPICKLE, open_shards, read_object
from pimerge.checkpoints.safetensors_file import TensorFile, joined, open_tensors
from pimerge.core.errors import PimergeError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TASK = "task.json"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")


def find_experts(pool: Path) -> list[Path]:
    """Find the experts of a pool: every folder in it that holds an adapter, or the pool itself if it is one."""
    if not pool.is_dir():
        raise PimergeError(f"there is no folder '{pool}'", "name the folder that holds the experts")
    if looks_like_expert(pool):
        return [pool]
    found = sorted(child for child in pool.iterdir() if not child.name.startswith(".") and looks_like_expert(child))
    if not found and any(pool.glob("*.safetensors")):
        raise PimergeError(
            f"'{pool}' holds state dicts but no expert",
            f"use them without a store: pimerge rank --target {pool}/NAME.safetensors, pimerge merge FILE FILE",
        )
    if not found:
        raise PimergeError(
            f"'{pool}' holds no expert",
            f"expected folders with {CONFIG} and {WEIGHTS}, as PEFT's save_pretrained writes them",
        )
    return found


def looks_like_expert(folder: Path) -> bool:
    """Whether a folder holds an adapter's config or weights."""
    names = (CONFIG, WEIGHTS, WEIGHTS + INDEX, *_PICKLES[:3])
    return folder.is_dir() and any((folder / name).exists() for name in names)


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
