"""A folder of an expert that PEFT loads, whatever files the expert was read from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pimerge.adapters.expert import Expert
from pimerge.adapters.expert_files import CONFIG, WEIGHTS
from pimerge.adapters.format import PEFT
from pimerge.checkpoints.dtypes import size_of
from pimerge.checkpoints.safetensors_file import open_tensors, writing_tensors
from pimerge.core.errors import PimergeError
from pimerge.core.files import json_text, read_json


@contextmanager
def peft_folder(expert: Expert) -> Iterator[Path]:
    """Yield the expert's own folder if PEFT reads the same there, otherwise a temporary copy in PEFT's format."""
    if expert.format != PEFT:
        raise PimergeError(
            f"'{expert.name}' has the format of {expert.format}, which PEFT does not load", "convert it to PEFT first"
        )
    if _is_own(expert):
        yield expert.folder
        return
    with TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json_text(expert.config), encoding="utf-8")
        entries = expert.file.entries
        with writing_tensors(Path(folder) / WEIGHTS, entries) as writer:
            for key in sorted(entries, key=lambda key: -size_of(entries[key].dtype)):
                writer.add_pieces(key, entries[key].dtype, entries[key].shape, expert.file.pieces(key))
        yield Path(folder)


def _is_own(expert: Expert) -> bool:
    """Whether the folder holds the expert under PEFT's names of files, with the keys and the config that were read."""
    weights, config = expert.folder / WEIGHTS, expert.folder / CONFIG
    if expert.file.files != [weights] or expert.config_file != config:
        return False
    return open_tensors(weights).entries == expert.file.entries and read_json(config) == expert.config
