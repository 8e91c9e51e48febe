"""``pimerge.convert``: bring an adapter or a checkpoint to the files that today's libraries read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pimerge.core.arguments import checked_arguments
from pimerge.core.errors import PimergeError, passed_over
from pimerge.core.files import json_text, new_file, new_folder, output_lock, read_json, require_absent
from pimerge.core.progress import Note, Track, silent, unheard

if TYPE_CHECKING:
    from pimerge.adapters.expert import Expert
    from pimerge.adapters.source import AdapterSource
    from pimerge.merging.merged import Merged

SAFETENSORS = ".safetensors"


@dataclass
class Converted:
    """What :func:`convert` wrote.

    Attributes:
        path: the folder or file.
        summary: what was converted, in a sentence.
        results: its numbers, for the JSON document.
        merged: the merge that computed a LoRA of another rank, with the error of each module; None for other
            conversions.
    """

    path: Path
    summary: str
    results: dict[str, Any] = field(default_factory=dict)
    merged: Merged | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {"output": str(self.path), "summary": self.summary, **self.results}


@checked_arguments()
def convert(
    source: str | Path,
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    base: str | Path | None = None,
    config: str | Path | None = None,
    output: str | Path = "converted",
    force: bool = False,
    track: Track = silent,
    note: Note = unheard,
) -> Converted:
    """Bring an adapter or a checkpoint to the files that today's libraries read.

    Weights in PyTorch's pickles (``.bin``, ``.pt``, ``.pth``, ``.ckpt``), of an adapter or of a model, become
    safetensors files; the other files of their folder are copied. A pickle is read by
    ``torch.load(weights_only=True)``, which runs none of its code. No other function of pimerge reads a pickle.

    With ``rank``, an adapter of any kind with updates ΔW becomes a LoRA of that rank: in each module the truncated
    singular value decomposition of ΔW, its nearest matrix of that rank (Eckart and Young, 1936). This is a merge of one
    expert.

    Args:
        source: folder or file of an adapter or a model, or the Hub id of an adapter.
        rank: rank of the LoRA: a number, ``max`` (lossless) or ``auto`` (the lowest that keeps ``energy``). None keeps
            the adapter's kind.
        energy: share of ‖ΔW‖² to keep in every module; it implies ``rank="auto"``.
        base: base model of the adapter, a folder or Hub id, for updates that depend on the base's weights. None stands
            for the base that the adapter names.
        config: the ``adapter_config.json`` of a single file of PEFT or mlx-lm. None stands for the one beside it.
        output: folder to write; for a single file also a name that ends in ``.safetensors``.
        force: overwrite ``output`` if it exists; the input is never overwritten.
        track: reports progress.
        note: receives messages, such as what is left out.

    Returns:
        what was written: ``path``, ``summary``, ``merged`` (with the errors by module if there is a rank) and
        ``to_dict()``.

    Example::

        pimerge.convert("runs/loha", rank=16, output="runs/lora")
        pimerge.convert("models/bert", output="models/bert-safetensors")  # its weights are in pytorch_model.bin
    """
    given, output = Path(source), Path(output)
    with output_lock(output, note):
        require_absent(output, True)  # without --force, what is there is compared with the result
        if given.exists() and given.resolve().is_relative_to(output.resolve()):
            raise PimergeError(f"the output '{output}' is the input or contains it", "choose another --output")
        if energy is not None and rank is None:
            rank = "auto"
        pickled = _pickled(given, output)
        if pickled is not None and config is not None:
            raise PimergeError("--config does not apply to pickled weights", "put the config into their folder")
        if rank is not None:
            if pickled is None:
                return _to_lora(_opened(source, base, config), rank, energy, base, output, force, track, note)
            with _unpickled(pickled, base, track) as expert:
                return _to_lora(expert, rank, energy, base, output, force, track, note)
        if pickled is None:
            return _to_peft(source, base, config, output, force, track, note)
        return _unpickle(pickled, output, force, track, note)


def _pickled(path: Path, output: Path) -> Path | None:
    """The folder or file that holds pickled weights; for its only file, the folder, unless the output is a file."""
    from pimerge.checkpoints.checkpoint import PICKLES
    from pimerge.checkpoints.pickled_folder import has_pickled_weights
    from pimerge.checkpoints.pickles import weight_pickles

    if path.is_dir():
        return path if has_pickled_weights(path) else None
    if path.suffix not in PICKLES or not path.is_file():
        return None
    is_model = any((path.parent / name).is_file() for name in ("config.json", "adapter_config.json"))
    return path.parent if is_model and output.suffix != SAFETENSORS and weight_pickles(path.parent) == [path] else path


def _unpickle(pickled: Path, output: Path, force: bool, track: Track, note: Note) -> Converted:
    """Write pickled weights as safetensors: a folder, or a file for a file."""
    from pimerge.checkpoints.pickled_folder import Unpickled, safetensors_name, unpickle_folder
    from pimerge.checkpoints.pickles import read_pickle

    found = Unpickled()
    if pickled.is_dir():
        if output.suffix == SAFETENSORS:
            raise PimergeError(f"'{pickled}' is a folder, but the output '{output}' is a file", "name a folder")
        with new_folder(output, force=force) as partial:
            unpickle_folder(pickled, partial, found, track)
            _move_paths(pickled, partial, output)
    elif output.suffix == SAFETENSORS:
        with new_file(output, force=force) as partial:
            found.write(read_pickle(pickled), partial, output.name)
    else:
        name = safetensors_name(pickled.name)
        with new_folder(output, force=force) as partial:
            found.write(read_pickle(pickled), partial / name, name)
    if found.tied:
        note(f"not written, since the model ties them to other tensors: {', '.join(found.tied)}")
    files = "1 safetensors file" if len(found.files) == 1 else f"{len(found.files)} safetensors files"
    return Converted(
        output,
        f"{found.tensors} tensors of PyTorch's pickles, now in {files}",
        {"tensors": found.tensors, "size": found.size, "files": found.files, "tied": found.tied},
    )


def _move_paths(source: Path, partial: Path, output: Path) -> None:
    """Write the files that hold paths, to the base and to a task's data, so that they are relative to the output."""
    from pimerge.adapters.expert_files import CONFIG, TASK
    from pimerge.adapters.expert_parts import base_of
    from pimerge.adapters.writer import base_reference
    from pimerge.tasks.task import open_task

    if (source / TASK).is_file():
        with passed_over():  # the weights are of use without a readable task
            (partial / TASK).write_text(json_text(open_task(source).document_for(output)), encoding="utf-8")
    if (partial / CONFIG).is_file():
        with passed_over():  # and without a base on this machine
            config = read_json(partial / CONFIG)
            config["base_model_name_or_path"], _ = base_reference(base_of(source, config, None), output)
            (partial / CONFIG).write_text(json_text(config), encoding="utf-8")


def _to_peft(
    source: str | Path,
    base: str | Path | None,
    config: str | Path | None,
    output: Path,
    force: bool,
    track: Track,
    note: Note,
) -> Converted:
    """Write an adapter in any file format as a folder of PEFT."""
    from pimerge.adapters.as_peft import as_peft
    from pimerge.adapters.expert import open_expert
    from pimerge.adapters.format import PEFT
    from pimerge.adapters.source import open_source
    from pimerge.checkpoints.checkpoint import is_checkpoint

    if is_checkpoint(source):
        raise PimergeError(f"'{source}' is a model in safetensors: there is nothing to convert")
    found = open_source(source, _path(config))
    if found.format == PEFT:
        return _to_folder(found, base, output, force)
    expert = as_peft(open_expert(source, _text(base), config=_path(config)))
    converted = _to_lora(expert, "max", None, base, output, force, track, note)
    return replace(
        converted, summary=f"the updates of '{expert.name}', in the format of {found.format}, as LoRA of PEFT"
    )


def _to_folder(found: AdapterSource, base: str | Path | None, output: Path, force: bool) -> Converted:
    """Write an adapter with PEFT's config as PEFT does: one file, under today's keys, beside its config."""
    from pimerge.adapters.expert_files import CONFIG, WEIGHTS
    from pimerge.adapters.expert_parts import canonical, kind_of
    from pimerge.adapters.kind import KINDS
    from pimerge.checkpoints.safetensors_file import open_tensors, writing_tensors

    kind, unhandled = kind_of(found.config)
    source, _ = canonical(found, None if unhandled else KINDS.load(kind), _text(base))
    usual = source.path / WEIGHTS
    if usual.is_file() and list(open_tensors(usual).entries) == list(source.file.entries):
        raise PimergeError(
            f"'{source.path}' is a folder of PEFT with safetensors: there is nothing to convert",
            "pass --rank N to turn it into a LoRA of another rank",
        )
    tensors = {key: source.file.read(key) for key in source.file.entries}
    with new_folder(output, force=force) as partial:
        with writing_tensors(partial / WEIGHTS, tensors) as writer:
            writer.add_all(tensors)
        (partial / CONFIG).write_text(json_text(source.config), encoding="utf-8")
        _move_paths(source.path.parent if source.path.is_file() else source.path, partial, output)
    return Converted(
        output, f"{len(tensors)} tensors, now a folder of PEFT", {"tensors": len(tensors), "size": writer.written}
    )


@contextmanager
def _unpickled(pickled: Path, base: str | Path | None, track: Track) -> Iterator[Expert]:
    """Open an adapter whose weights are pickled."""
    from pimerge.adapters.expert import open_expert
    from pimerge.adapters.expert_files import CONFIG
    from pimerge.adapters.expert_parts import base_of
    from pimerge.checkpoints.pickled_folder import Unpickled, unpickle_folder

    if not (pickled / CONFIG).is_file():
        raise PimergeError(f"'{pickled}' is not an adapter, which --rank and --energy need", "leave them out")
    named = None
    with suppress(PimergeError):  # most kinds do not need the base
        named = base_of(pickled, read_json(pickled / CONFIG), _text(base)).reference
    with TemporaryDirectory() as folder:
        unpickle_folder(pickled, Path(folder), Unpickled(), track)
        expert = open_expert(folder, named, convert=base is not None)
        yield replace(expert, path=pickled, base_override=_text(base))


def _to_lora(
    expert: Expert,
    rank: int | str,
    energy: float | None,
    base: str | Path | None,
    output: Path,
    force: bool,
    track: Track,
    note: Note,
) -> Converted:
    """Write an adapter as a LoRA of a rank, which is a merge of one expert at weight 1.

    It becomes an adapter of PEFT, except for one of a diffusion model, which keeps its file format.
    """
    from pimerge.adapters.as_peft import as_peft, is_named_by_base

    expert = as_peft(expert) if is_named_by_base(expert) else expert
    if expert.tensor_sets:
        raise PimergeError(
            f"'{expert.name}' is of kind {expert.kind}, which has no LoRA: {expert.strategy.why_no_update}",
            "leave --rank and --energy out",
        )
    from pimerge.merging.merge import merge

    merged = merge(
        [expert],
        method="interpolated",
        weights=[1.0],
        target=expert,  # not that of a ranking in the working folder
        rank=rank,
        energy=energy,
        base=_text(base),
        output=output,
        force=force,
        track=track,
        note=note,
    )
    return Converted(
        output, f"the updates of '{expert.name}', of kind {expert.kind}, as LoRA", merged.to_dict(), merged
    )


def _opened(source: str | Path, base: str | Path | None, config: str | Path | None) -> Expert:
    from pimerge.adapters.expert import open_expert

    return open_expert(source, _text(base), convert=base is not None, config=_path(config))


def _path(config: str | Path | None) -> Path | None:
    return None if config is None else Path(config)


def _text(base: str | Path | None) -> str | None:
    return None if base is None else str(base)
