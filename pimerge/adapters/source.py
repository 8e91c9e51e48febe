"""Open an adapter as a PEFT config and tensors under PEFT's keys, whatever its files are."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pimerge.adapters.expert_files import CONFIG, WEIGHTS, looks_like_expert, tensors_of
from pimerge.adapters.hub import download, is_hub_reference
from pimerge.checkpoints.safetensors_file import TensorFile, open_tensors
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.files import read_json


@dataclass(frozen=True)
class AdapterSource:
    """The files of an adapter; see :func:`open_source`.

    Attributes:
        path: its folder, or its file if it is a single file.
        config: the content of ``adapter_config.json``.
        file: its tensors, under the keys that PEFT writes.
        config_file: the file that the config was read from.
    """

    path: Path
    config: dict[str, Any]
    file: TensorFile
    config_file: Path


def open_source(reference: str | Path, config: Path | None = None) -> AdapterSource:
    """Open the files of an adapter and check that they can be read; all problems are raised at once.

    Args:
        reference: a folder, a single safetensors file, or a Hub id (``org/name`` or ``org/name@revision``).
        config: the ``adapter_config.json`` of a single file; None for the one beside it.
    """
    path = Path(reference)
    if os.path.isfile(path):  # unlike Path.is_file, False for an invalid name
        return _open_file(path, config)
    if os.path.isdir(path):
        if not looks_like_expert(path):
            raise _not_an_expert(path)
    elif isinstance(reference, str) and is_hub_reference(reference):
        path = download(reference)
    else:
        raise PimergeError(f"there is no expert '{reference}'", "expected a folder or a Hub id (org/name@revision)")
    return _read(path, config or path / CONFIG, lambda: tensors_of(path))


def _open_file(path: Path, config: Path | None) -> AdapterSource:
    """Open a single file; ``adapter_model.safetensors`` beside its config stands for its folder."""
    beside = path.with_name(CONFIG)
    if path.suffix != ".safetensors":
        raise PimergeError(f"'{path}' is a file, expected the folder of an expert or a .safetensors file")
    if config is None and not beside.is_file():
        raise PimergeError(
            f"'{path}' holds the tensors of an adapter, but no {CONFIG} is beside it, which states the scaling alpha",
            f"copy its {CONFIG} into the folder",
        )
    if path.name == WEIGHTS and config is None:
        return _read(path.parent, beside, lambda: open_tensors(path))
    return _read(path, config or beside, lambda: open_tensors(path))


def _read(path: Path, config_file: Path, tensors: Callable[[], TensorFile]) -> AdapterSource:
    """Read the config and open the tensors; problems of both are raised at once."""
    problems = Problems()
    config: Any = {}
    file = None
    with problems.collected():
        config = read_json(config_file)
        if not isinstance(config, dict):
            raise PimergeError(f"'{config_file}' is not a JSON object", "save the adapter again with PEFT")
    with problems.collected():
        file = tensors()
    problems.raise_any(f"the expert '{path}' has several problems")
    assert file is not None
    return AdapterSource(path, config, file, config_file)


def _not_an_expert(path: Path) -> PimergeError:
    inside = [str(each) for each in sorted(path.iterdir()) if looks_like_expert(each)]
    return PimergeError(
        f"'{path}' is not an expert: it has neither {CONFIG} nor {WEIGHTS}",
        f"name an expert in it: {', '.join(inside[:5])}" if inside else "",
    )
