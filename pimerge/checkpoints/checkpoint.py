"""Full checkpoints: a folder of transformers or diffusers, or a single safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pimerge.checkpoints.adapter_keys import adapter_keys, is_adapter_file
from pimerge.checkpoints.empty_tensors import refuse_empty
from pimerge.checkpoints.quantised import refuse_quantised
from pimerge.checkpoints.safetensors_file import Entry, TensorFile, open_tensors
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.files import read_json, sha256_bytes, sha256_files
from pimerge.core.plain_names import is_plain_name

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
INDEX = ".index.json"
_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
UNPICKLE = "convert it without running its code: pimerge convert {} -o NEW"
"""What to do with a pickle; the place is for its path."""


@dataclass(frozen=True)
class Checkpoint:
    """A full checkpoint whose files have been checked; see :func:`open_checkpoint`.

    Attributes:
        path: its folder or file.
        files: the files that hold tensors, in order.
        config: the content of ``config.json``; empty for a single file.
        index: the content of the index of shards; empty without one.
        label: its name among others with folders of the same name.
        is_view: whether its tensors and config differ from those in its files, so that a copy needs a new config.
    """

    path: Path
    files: tuple[TensorFile, ...]
    config: dict[str, Any] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)
    is_view: bool = False
    label: str = ""

    @property
    def name(self) -> str:
        """The name of its folder or file; the repository's name for a snapshot in the Hub's local cache."""
        path = self.path.resolve() if self.path.is_dir() else self.path
        if self.label:
            return self.label
        return path.parents[1].name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name

    @property
    def is_file(self) -> bool:
        """Whether it is a single file without a config."""
        return len(self.files) == 1 and self.files[0].path == self.path

    @cached_property
    def home(self) -> dict[str, TensorFile]:
        """Key → the file that holds it, in the order of the files."""
        return {key: file for file in self.files for key in file.entries}

    @cached_property
    def size(self) -> int:
        """Number of bytes of its tensors."""
        return sum(entry.end - entry.start for file in self.files for entry in file.entries.values())

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the hashes of its files, as in :attr:`pimerge.checkpoints.base.Base.identity`."""
        return sha256_bytes("".join(sha256_files([file.path for file in self.files])).encode())

    def entry(self, key: str) -> Entry:
        """Dtype, shape and location of a tensor."""
        return self.home[key].entries[key]

    def read(self, key: str) -> Tensor:
        """Read one tensor."""
        return self.home[key].read(key)


def is_state_dict(path: str | Path) -> bool:
    """Whether a path is a single file of tensors that are weights, not the factors of an adapter.

    >>> is_state_dict("no/such.safetensors")
    False
    """
    return str(path).endswith(".safetensors") and os.path.isfile(path) and not is_adapter_file(path)


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a full checkpoint: a folder with a config and no adapter, or one safetensors file."""
    inside = [os.path.isfile(os.path.join(path, name)) for name in (CONFIG, "adapter_config.json")]
    return is_state_dict(path) or inside == [True, False]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint and check its headers; no tensor is read.

    Args:
        path: a folder with ``config.json`` and ``model.safetensors`` or an index and its shards (or the
            names that diffusers uses), or a single ``.safetensors`` file.
    """
    if path.is_file():
        if path.suffix in PICKLES:
            raise PimergeError(
                f"'{path}' is a pickle, which can run code when it is read; only safetensors files are read",
                UNPICKLE.format(path),
            )
        checkpoint = Checkpoint(path, (open_tensors(path),))
    elif path.is_dir():
        checkpoint = _open_folder(path)
    else:
        raise PimergeError(f"there is no checkpoint '{path}'", "expected a folder or a .safetensors file")
    if not checkpoint.home:
        raise PimergeError(f"the checkpoint '{path}' holds no tensors", "download or save it again")
    return checkpoint


def _open_folder(path: Path) -> Checkpoint:
    weights = weights_file(path)
    problems = Problems()
    config: dict[str, Any] = {}
    with problems.collected():
        config = read_object(path / CONFIG)
    index: dict[str, Any] = {}
    files: tuple[TensorFile, ...] = ()
    with problems.collected():
        if weights.name.endswith(INDEX):
            index = read_object(weights)
            files = open_shards(path, weights.name, index)
        else:
            files = (open_tensors(weights),)
    problems.raise_any(f"the checkpoint '{path}' has several problems")
    return Checkpoint(path, files, config, index)


def require_weights(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with quantised or empty weights, or with factors of an adapter beside its weights."""
    if factors := adapter_keys(checkpoint.home):
        raise PimergeError(
            f"the checkpoint '{checkpoint.path}' holds factors of an adapter, such as '{factors[0]}'",
            "merge them into its weights first, with PEFT's merge_and_unload, and save it again",
        )
    refuse_quantised(checkpoint.path, checkpoint.config, {key: checkpoint.entry(key).dtype for key in checkpoint.home})
    refuse_empty({key: checkpoint.entry(key).shape for key in checkpoint.home}, f"the checkpoint '{checkpoint.path}'")


def weights_file(folder: Path) -> Path:
    """The safetensors file or the index that transformers would load."""
    for name in _NAMES:
        for path in (folder / name, folder / (name + INDEX)):
            if path.is_file():
                return path
    found = sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors" + INDEX)])
    found = [path for path in found if not path.name.startswith("adapter_model")]
    if len(found) == 1:
        return found[0]
    if found:
        raise PimergeError(
            f"'{folder}' holds {len(found)} safetensors files and no model.safetensors{INDEX}: "
            f"{', '.join(path.name for path in found[:4])}",
            "download the index as well, or name one file",
        )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if (folder / "adapter_config.json").is_file():
        raise PimergeError(f"'{folder}' is an adapter, expected a full checkpoint")
    if (folder / "model_index.json").is_file():
        raise PimergeError(f"'{folder}' is a pipeline of diffusers", "name the folder in it: unet or transformer")
    if pickles:
        raise PimergeError(
            f"'{folder}' holds pickles ({', '.join(pickles[:4])}), which can run code when they are read",
            UNPICKLE.format(folder),
        )
    raise PimergeError(f"'{folder}' holds no weights", "expected model.safetensors, or its index and shards")


def open_shards(folder: Path, name: str, index: Mapping[str, Any]) -> tuple[TensorFile, ...]:
    """Open the shards of an index and check that they hold exactly the tensors that it names.

    Args:
        name: file name of the index.
        index: its content.
    """
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise PimergeError(f"'{folder / name}' has no weight_map", "download the index again")
    problems = Problems()
    files: dict[str, TensorFile] = {}
    for shard in sorted(set(places.values())):
        if not is_plain_name(shard) or not (folder / shard).is_file():
            problems.add(f"{name} names the shard '{shard}', which does not exist", "download the checkpoint again")
            continue
        with problems.collected():
            files[shard] = open_tensors(folder / shard)
    for shard, file in files.items():
        _check_shard(shard, {key for key, place in places.items() if place == shard}, file, places, problems)
    problems.raise_any(f"'{folder / name}' does not fit its shards")
    return tuple(files.values())


def _check_shard(
    shard: str, expected: set[str], file: TensorFile, places: Mapping[str, str], problems: Problems
) -> None:
    for key in sorted(expected - file.entries.keys()):
        problems.add(f"'{shard}' lacks '{key}', which the index says it holds", "download the shard again")
    for key in sorted(file.entries.keys() - expected):
        where = f"the index has it in '{places[key]}'" if key in places else "the index does not name it"
        problems.add(f"'{shard}' holds '{key}', but {where}", "download the index and the shards again")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    document = read_json(path)
    if not isinstance(document, dict):
        raise PimergeError(f"'{path}' is not a JSON object", "download or save the checkpoint again")
    return document
