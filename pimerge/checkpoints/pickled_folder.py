"""Copy a folder whose weights are pickles, with the weights as safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pimerge.checkpoints.checkpoint import CONFIG, INDEX, PICKLES, Checkpoint, read_object
from pimerge.checkpoints.pickles import Tensors, read_pickle, weight_pickles, without_tied
from pimerge.checkpoints.safetensors_file import writing_tensors
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.files import disk_errors, json_text, read_json
from pimerge.core.manifest import MANIFEST_FILE
from pimerge.core.plain_names import is_plain_name
from pimerge.core.progress import Track

_OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".tflite")


@dataclass
class Unpickled:
    """What was written.

    Attributes:
        tensors: the number of tensors.
        size: their bytes.
        files: the safetensors files, relative to the output.
        tied: names that share the memory of another tensor, to which the model ties them; they are left out.
    """

    tensors: int = 0
    size: int = 0
    files: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)

    def write(self, tensors: Tensors, path: Path, name: str) -> None:
        """Write one file, in the memory of one tensor if the pickle is mapped."""
        with disk_errors(path), writing_tensors(path, tensors) as writer:
            writer.add_all(tensors)
        self.tensors += len(tensors)
        self.size += writer.written
        self.files.append(name)


def has_pickled_weights(folder: Path) -> bool:
    """Whether a folder, or a part of the pipeline that it describes, has its weights in pickles only."""
    pickled = bool(weight_pickles(folder)) and not any(folder.glob("*.safetensors"))
    return pickled or any(map(has_pickled_weights, _parts(folder)))


def unpickle_folder(folder: Path, output: Path, found: Unpickled, track: Track, inside: str = "") -> None:
    """Write a folder again with safetensors in place of pickles, under the names that libraries look for.

    The other files are copied, without the states of a training and the weights of other frameworks. A pipeline of
    diffusers and a model of sentence-transformers are converted with the folders that they name.

    Args:
        output: an empty folder.
        found: what was written; it is added to.
        inside: the beginning of the names in ``found.files``, for a part of a pipeline.
    """
    pickles = [] if any(folder.glob("*.safetensors")) else weight_pickles(folder)
    if len(pickles) > 1:
        raise PimergeError(
            f"'{folder}' holds {len(pickles)} pickles: {', '.join(path.name for path in pickles[:6])}", "name one file"
        )
    for path in pickles:
        if path.name.endswith(INDEX):
            _unpickle_shards(path, output, found, track, inside)
        else:
            name = safetensors_name(path.name)
            with track("writing", 1, "files") as advance:
                tensors, tied = without_tied(read_pickle(path), _ties(folder))
                found.tied += tied
                found.write(tensors, output / name, inside + name)
                advance()
    for path in _others(folder):
        shutil.copyfile(path, output / path.name)
    for part in _parts(folder):
        target = output / part.relative_to(folder)
        target.mkdir(parents=True, exist_ok=True)
        unpickle_folder(part, target, found, track, f"{inside}{part.relative_to(folder).as_posix()}/")


def _unpickle_shards(path: Path, output: Path, found: Unpickled, track: Track, inside: str) -> None:
    """Write every shard of an index, and the index."""
    folder, index = path.parent, read_object(path)
    places: Any = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise PimergeError(f"'{path}' has no weight_map", "download the index again")
    shards = sorted(set(places.values()))
    problems = Problems()
    for shard in shards:
        if not is_plain_name(shard) or not (folder / shard).is_file():
            problems.add(
                f"{path.name} names the shard '{shard}', which does not exist", "download the checkpoint again"
            )
    problems.raise_any(f"'{path}' does not fit its shards")
    ties, before = _ties(folder), found.size
    written: dict[str, str] = {}
    with track("writing", len(shards), "files") as advance:
        for shard in shards:
            tensors = {key: value for key, value in read_pickle(folder / shard).items() if places.get(key) == shard}
            for key in sorted({key for key, place in places.items() if place == shard} - tensors.keys()):
                problems.add(f"'{shard}' lacks '{key}', which the index says it holds", "download the shard again")
            tensors, tied = without_tied(tensors, ties)
            found.tied += tied
            name = safetensors_name(shard)
            found.write(tensors, output / name, inside + name)
            written |= dict.fromkeys(tensors, name)
            advance()
    problems.raise_any(f"'{path}' does not fit its shards")
    metadata = {**(index.get("metadata") or {}), "total_size": found.size - before}
    document = {**index, "metadata": metadata, "weight_map": {key: written[key] for key in places if key in written}}
    (output / safetensors_name(path.name)).write_text(json_text(document), encoding="utf-8")


def safetensors_name(name: str) -> str:
    """The name that transformers, diffusers and PEFT give the safetensors file of a pickle, or of an index.

    >>> [safetensors_name(n) for n in ("pytorch_model.bin", "adapter_model.pth", "pytorch_model.bin.index.json")]
    ['model.safetensors', 'adapter_model.safetensors', 'model.safetensors.index.json']
    >>> safetensors_name("diffusion_pytorch_model-00001-of-00002.bin")
    'diffusion_pytorch_model-00001-of-00002.safetensors'
    """
    index = INDEX if name.endswith(INDEX) else ""
    stem = name.removesuffix(index).rpartition(".")[0]
    return (f"model{stem.removeprefix('pytorch_model')}" if stem.startswith("pytorch_model") else stem) + (
        ".safetensors" + index
    )


def _ties(folder: Path) -> Mapping[str, str]:
    """Name of a parameter → the one that the model of a config ties it to; empty for an unknown model."""
    if not (folder / CONFIG).is_file():
        return {}
    from pimerge.checkpoints.key_mapping import skeleton  # imports torch

    model = skeleton(Checkpoint(folder, ()), read_object(folder / CONFIG))
    return {} if model is None else dict(model.all_tied_weights_keys)


def _others(folder: Path) -> Iterator[Path]:
    """The files to copy: neither pickles, nor weights of other frameworks, nor what describes the replaced files."""
    left_out = (*PICKLES, *_OTHER_WEIGHTS, ".bin" + INDEX, MANIFEST_FILE)
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(left_out):
            yield path


def _parts(folder: Path) -> list[Path]:
    """The folders that a pipeline of diffusers or a model of sentence-transformers names."""
    names: list[Any] = []
    if (folder / "model_index.json").is_file():
        names += [name for name, value in read_object(folder / "model_index.json").items() if isinstance(value, list)]
    if (folder / "modules.json").is_file():
        modules = read_json(folder / "modules.json")
        names += [part.get("path") for part in modules if isinstance(part, dict)] if isinstance(modules, list) else []
    parts = [folder / name for name in names if isinstance(name, str) and name]
    inside = folder.resolve()
    return sorted({p for p in parts if p.is_dir() and p.resolve() != inside and p.resolve().is_relative_to(inside)})
