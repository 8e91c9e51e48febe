"""Open an adapter as a PEFT config and tensors under PEFT's keys, whatever its files are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pimerge.adapters.expert_files import CONFIG, WEIGHTS, has_weights, looks_like_expert, tensors_of
from pimerge.adapters.format import FORMATS, PEFT, Format, Place
from pimerge.adapters.formats._keys import summarised
from pimerge.adapters.hub import download, is_hub_reference
from pimerge.adapters.lora_module import LoraModule
from pimerge.adapters.other_writers import refuse_other_writers
from pimerge.checkpoints.adapter_keys import adapter_keys, factor_keys, is_adapter_file
from pimerge.checkpoints.checkpoint import PICKLES, UNPICKLE
from pimerge.checkpoints.safetensors_file import TensorFile, open_tensors
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.files import read_json

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class AdapterSource:
    """The files of an adapter; see :func:`open_source`.

    Attributes:
        path: its folder, or its file if it is a single file.
        config: the content of PEFT's ``adapter_config.json``, or the fields of it that another format states.
        file: its tensors, under the keys that PEFT gives them.
        format: the name of its format.
        config_file: the file that the config was read from; None if the format needs none.
        modules: name → update; None if the kind in the config says how to read the tensors.
        places: name → place in the file, for formats other than PEFT's.
    """

    path: Path
    config: dict[str, Any]
    file: TensorFile
    format: str = PEFT
    config_file: Path | None = None
    modules: Mapping[str, LoraModule] | None = None
    places: Mapping[str, Place] = field(default_factory=dict)


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
        return _open_folder(path)
    if isinstance(reference, str) and is_hub_reference(reference):
        return _open_folder(download(reference))
    raise PimergeError(f"there is no expert '{reference}'", "expected a folder, a file or a Hub id (org/name@revision)")


def adapter_files(folder: Path) -> list[Path]:
    """The adapters in a folder that are single files, in alphabetical order."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith(".") and is_adapter_file(path))


def _open_folder(path: Path) -> AdapterSource:
    """Open a folder of PEFT or mlx-lm, or a folder that holds one file of another format."""
    config_file = path / CONFIG
    refuse_other_writers(path)
    if not has_weights(path):
        files = adapter_files(path)
        if len(files) == 1:
            return _as_folder(_open_file(files[0], None))
        if len(files) > 1:
            listed = ", ".join(map(str, files[:5]))
            raise PimergeError(f"'{path}' holds {len(files)} adapters, each in a file", f"name one of them: {listed}")
        if not looks_like_expert(path):
            raise _not_an_expert(path)
    config, file = _read(path, config_file, lambda: tensors_of(path))
    return AdapterSource(path, config, file, config_file=config_file)


def _as_folder(source: AdapterSource) -> AdapterSource:
    """The only adapter of a folder goes by the folder's name."""
    return AdapterSource(**vars(source) | {"path": source.file.path.parent})


def _open_file(path: Path, given: Path | None) -> AdapterSource:
    """Open a single file; the usual file of a format beside its config stands for its folder."""
    if path.suffix in PICKLES:
        raise PimergeError(
            f"'{path}' is a pickle, which can run code when it is read; only {SUFFIX} files are read",
            UNPICKLE.format(path),
        )
    if path.suffix != SUFFIX:
        refuse_other_writers(path)
        if path.suffix in PICKLES:
            raise PimergeError(f"'{path}' is a pickle, which can run code when it is read", UNPICKLE.format(path))
        raise PimergeError(f"'{path}' is a file, expected the folder of an expert or a {SUFFIX} file")
    beside = path.with_name(CONFIG)
    config_file = given or (beside if beside.is_file() else None)
    config, file = _read(path, config_file, lambda: open_tensors(path))
    format_ = _format_of(path, file, has_config="peft_type" in config)
    if format_.needs_config and config_file is None:
        raise PimergeError(
            f"'{path}' holds factors as {format_.tool.partition(',')[0]} writes them, whose scaling alpha is in an "
            f"{CONFIG}, and none is beside it",
            "pass it with --config FILE, or copy it into the folder; or name the folder that holds both",
        )
    if not format_.needs_config:
        config_file = None
    problems = Problems()
    with problems.collected():
        content = format_.read(file, config)
        if not content.config.get("base_model_name_or_path") and (base := format_.base(file.metadata)):
            content.config["base_model_name_or_path"] = base
        stands_for_folder = format_.needs_config and path.name == format_.file_name and given is None
        return AdapterSource(
            path.parent if stands_for_folder else path,
            content.config,
            content.file,
            format_.name,
            config_file,
            content.modules,
            content.places,
        )
    problems.raise_any(f"the adapter '{path}' cannot be read")
    raise AssertionError("unreachable: a problem was raised")


def _format_of(path: Path, file: TensorFile, *, has_config: bool) -> Format:
    """The format of a file by its keys."""
    own = adapter_keys(file.entries) or factor_keys({key: entry.shape for key, entry in file.entries.items()})
    if not own and not has_config:
        raise PimergeError(
            f"'{path}' is a plain state dict, not an adapter: it has keys such as '{next(iter(file.entries), '')}'",
            "name the folder of an adapter; only 'pimerge merge' and 'pimerge rank' take state dicts",
        )
    keys = summarised(file.entries, has_config=has_config)
    found = next((each for each in FORMATS if each.recognises(keys)), None)
    if found is None:
        raise PimergeError(
            f"'{path}' holds factors such as '{(own or list(file.entries))[0]}', in no format that pimerge reads",
            f"pimerge reads the formats: {', '.join(FORMATS.names())}",
        )
    return found


def _read(path: Path, config_file: Path | None, tensors: Callable[[], TensorFile]) -> tuple[dict[str, Any], TensorFile]:
    """Read the config and open the tensors; problems of both are raised at once."""
    problems = Problems()
    config: Any = {}
    file = None
    with problems.collected():
        config = {} if config_file is None else read_json(config_file)
        if not isinstance(config, dict):
            raise PimergeError(f"'{config_file}' is not a JSON object", "save the adapter again with PEFT")
    with problems.collected():
        file = tensors()
    problems.raise_any(f"the expert '{path}' has several problems")
    assert file is not None
    return as_used(config), file


def _not_an_expert(path: Path) -> PimergeError:
    levels = ([each for each in sorted(path.glob(level)) if looks_like_expert(each)] for level in ("*", "*/*", "*/*/*"))
    inside = next(([str(each) for each in found] for found in levels if found), [])
    more = f" and {len(inside) - 5} more" if len(inside) > 5 else ""
    return PimergeError(
        f"'{path}' is not an expert: it has neither {CONFIG} nor {WEIGHTS}",
        f"name the experts in it: {', '.join(inside[:5])}{more}" if inside else "",
    )


def as_used(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as PEFT uses it for predictions.

    P-tuning and a prefix with a projection train a network, but PEFT saves the vectors that it computes, and loads them
    as those of prompt tuning and of a plain prefix.

    >>> as_used({"peft_type": "P_TUNING", "token_dim": 8, "encoder_hidden_size": 4})
    {'peft_type': 'PROMPT_TUNING', 'token_dim': 8}
    """
    kept = {name: value for name, value in config.items() if not name.startswith("encoder_")}
    if config.get("peft_type") == "P_TUNING":
        return kept | {"peft_type": "PROMPT_TUNING"}
    if config.get("peft_type") == "PREFIX_TUNING" and config.get("prefix_projection") is True:
        return kept | {"prefix_projection": False}
    return dict(config)
