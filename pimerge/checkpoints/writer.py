"""Write a changed copy of a checkpoint, with the same shards, names and other files, piece by piece."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pimerge.checkpoints.checkpoint import CONFIG, INDEX, Checkpoint, weights_file
from pimerge.checkpoints.dtypes import FLOATS, dtype_name, size_of, torch_dtype
from pimerge.checkpoints.safetensors_file import PIECE, TensorFile, TensorWriter, bytes_of, writing_tensors
from pimerge.core.files import disk_errors, json_text, read_json
from pimerge.core.progress import Advance, Track, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_COPIED = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".spm", ".bpe")
_NOT_COPIED = ("adapter_config.json", "pimerge.json")

Change: TypeAlias = Callable[[str], "Iterable[Tensor] | None"]
"""Key → the new values of a tensor, flattened and in pieces; None if they do not change."""

Layout: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]
"""Key → dtype and shape."""


def write_like(
    checkpoint: Checkpoint,
    output: Path,
    change: Change,
    *,
    new: Layout | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    track: Track = silent,
) -> int:
    """Write a checkpoint with the same shards, order and names, in the memory of one piece of a tensor.

    Args:
        output: an empty folder, or a file's path if the checkpoint is a single file.
        change: gives the new values of a tensor; they are rounded once, to the dtype that is written.
        new: dtype and shape of each tensor that is added (to the last file) or whose shape or dtype changes.
        config: content that replaces ``config.json``; None keeps the file byte for byte.
        dtype: dtype of all floating tensors; None keeps the dtype of each.

    Returns:
        the number of bytes of all tensors.
    """
    entries = _written(checkpoint, new or {}, dtype)
    total = 0
    with disk_errors(output), track("writing", sum(map(len, entries)), "tensors") as advance:
        for file, wanted in zip(checkpoint.files, entries, strict=True):
            path = output if checkpoint.is_file else output / file.path.name
            with writing_tensors(path, wanted, file.metadata) as writer:
                _write_file(file, wanted, change, writer, advance)
                total += writer.written
        if not checkpoint.is_file:
            _write_others(checkpoint, output, entries, total, _with_dtype(checkpoint, config, dtype))
    return total


def _written(checkpoint: Checkpoint, new: Layout, dtype: torch.dtype | None) -> list[Layout]:
    """Key → dtype and shape to write, for each file; wide dtypes first, so that every tensor is aligned."""
    entries: list[Layout] = []
    for number, file in enumerate(checkpoint.files, 1):
        wanted: Layout = {key: new.get(key, (entry.dtype, entry.shape)) for key, entry in file.entries.items()}
        if number == len(checkpoint.files):
            wanted = {**wanted, **{key: found for key, found in new.items() if key not in checkpoint.home}}
        if dtype is not None:
            name = dtype_name(dtype)
            wanted = {key: (name if kind in FLOATS else kind, shape) for key, (kind, shape) in wanted.items()}
        sizes = [size_of(kind) for kind, _ in wanted.values()]
        if sizes != sorted(sizes, reverse=True):
            wanted = dict(sorted(wanted.items(), key=lambda item: -size_of(item[1][0])))
        entries.append(wanted)
    return entries


def _write_file(file: TensorFile, wanted: Layout, change: Change, writer: TensorWriter, advance: Advance) -> None:
    for key, (dtype, shape) in wanted.items():
        values = change(key)
        if values is None and file.entries[key].dtype == dtype:
            writer.add_pieces(key, dtype, shape, file.pieces(key))
        else:
            rounded = (piece.to(torch_dtype(dtype)) for piece in (flat_pieces(file, key) if values is None else values))
            writer.add_pieces(key, dtype, shape, map(bytes_of, rounded))
        advance()


def flat_pieces(file: TensorFile, key: str, share: int = 1) -> Iterator[Tensor]:
    """Yield a flattened tensor in pieces of at most PIECE/share bytes."""
    entry = file.entries[key]
    count = (entry.end - entry.start) // size_of(entry.dtype)
    step = max(1, PIECE // share // size_of(entry.dtype))
    for start in range(0, count, step):
        yield file.read_part(key, start, min(start + step, count))


def _with_dtype(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None, dtype: torch.dtype | None
) -> Mapping[str, Any] | None:
    """The config with the dtype that was written, since transformers loads a model in the dtype of its config."""
    if config is None and checkpoint.is_view:
        config = checkpoint.config
    found = checkpoint.config if config is None else config
    stated = {} if dtype is None else {name: str(dtype)[6:] for name in ("dtype", "torch_dtype") if found.get(name)}
    return {**found, **stated} if any(found[name] != value for name, value in stated.items()) else config


def _write_others(
    checkpoint: Checkpoint, output: Path, entries: list[Layout], total: int, config: Mapping[str, Any] | None
) -> None:
    for source in _others(checkpoint):
        target = output / source.relative_to(checkpoint.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    if config is not None:
        (output / CONFIG).write_text(json_text(dict(config)), encoding="utf-8")
    if checkpoint.index:
        places = {key: file.path.name for file, keys in zip(checkpoint.files, entries, strict=True) for key in keys}
        metadata = {**checkpoint.index.get("metadata", {}), "total_size": total}
        if "total_parameters" in metadata:
            added = places.keys() - checkpoint.home.keys()
            metadata["total_parameters"] += sum(
                math.prod(found[key][1]) for found in entries for key in found.keys() & added
            )
        order = [*checkpoint.index["weight_map"], *(key for key in places if key not in checkpoint.home)]
        document = {**checkpoint.index, "metadata": metadata, "weight_map": {key: places[key] for key in order}}
        name = weights_file(checkpoint.path).name
        (output / name).write_text(json_text(document), encoding="utf-8")


def _others(checkpoint: Checkpoint) -> Iterator[Path]:
    """The files that loading needs beside the weights; the caller writes the README."""
    folder = checkpoint.path
    for path in sorted(folder.iterdir()):
        is_licence = path.name.upper().startswith(("LICENSE", "NOTICE"))
        is_copied = path.suffix in _COPIED and path.name not in _NOT_COPIED and not path.name.endswith(INDEX)
        if path.is_file() and not path.name.startswith(".") and (is_copied or is_licence):
            yield path
    parts = read_json(folder / "modules.json") if (folder / "modules.json").is_file() else []
    named = [part.get("path") for part in parts if isinstance(part, dict)]  # a file of sentence-transformers
    for name in ("additional_chat_templates", *filter(None, named)):
        if (folder / name).resolve().is_relative_to(folder.resolve()):
            yield from sorted(path for path in (folder / name).rglob("*") if path.is_file())
