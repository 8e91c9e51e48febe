"""Pad the factors in an adapter's file to other ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pimerge.adapters.lora_module import LoraModule
from pimerge.checkpoints.safetensors_file import open_tensors, writing_tensors


def pad_factors(path: Path, modules: Iterable[LoraModule], ranks: Mapping[str, int]) -> None:
    """Pad A with rows and B with columns of zeros, which does not change ΔW; the file is rewritten tensor by tensor.

    Args:
        modules: the layout of the file.
        ranks: module → rank, at least its own.
    """
    import torch

    file = open_tensors(path)
    places: dict[str, tuple[int, int]] = {}
    for module in modules:
        rank = ranks.get(module.name, 0)
        places |= {module.A: (0, rank), module.B: (1, rank)}
    padded = path.with_name(f"{path.name}.padded")
    with writing_tensors(padded, file.entries, file.metadata) as writer:
        for key in file.entries:
            tensor = file.read(key)
            axis, rank = places.get(key, (0, 0))
            if more := max(0, rank - tensor.shape[axis] if tensor.dim() > axis else 0):
                shape = (*tensor.shape[:axis], more, *tensor.shape[axis + 1 :])
                tensor = torch.cat([tensor, tensor.new_zeros(shape)], axis)
            writer.add(key, tensor)
    padded.replace(path)
