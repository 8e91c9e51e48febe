"""Read PyTorch's pickles (``.bin``, ``.pt``, ``.pth``, ``.ckpt``): the only place in pimerge that reads one.

A pickle can run code when it is read. ``torch.load(weights_only=True)`` builds tensors and plain containers only and
refuses everything else, so nothing of the file is run.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pimerge.checkpoints.checkpoint import PICKLES
from pimerge.checkpoints.dtypes import dtype_name
from pimerge.core.errors import PimergeError, Problems

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = "dict[str, Tensor]"
_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")  # DistributedDataParallel, torch.compile, Lightning
_NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|trainer_state|lr_scheduler)\b|rng_state_\d+"
)
_WEIGHTS = ("adapter_model", "pytorch_model", "diffusion_pytorch_model", "model")
_AGAIN = "download or copy it again (a file of a few hundred bytes is a pointer of Git LFS: git lfs pull)"
_OPENED_BY_ITS_WRITER = (
    "if you trust it, read it with the program that wrote it, and save its tensors with safetensors.torch.save_file"
)


def weight_pickles(folder: Path) -> list[Path]:
    """The pickles with a folder's weights: one file, or the index of its shards; none if it holds no pickled weights.

    States of a training, such as ``optimizer.pt``, are not weights.
    """
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and (path.suffix in PICKLES or path.name.endswith(".bin.index.json"))
    ]
    found = [path for path in found if not _NOT_WEIGHTS.match(path.name)]
    for stem in _WEIGHTS:
        for ending in ("bin", "bin.index.json", "pt", "pth"):
            if (path := folder / f"{stem}.{ending}") in found:
                return [path]
    return found


def read_pickle(path: Path) -> Tensors:
    """Read the tensors of a file that ``torch.save`` wrote, under the names of the model's parameters.

    A training's file is searched for its state dict (``state_dict``, ``module``, ``model``, …), and the prefix of a
    wrapper that all names share (``module.`` of DistributedDataParallel, …) is removed. Tensors that share their
    memory in the file share it here as well. The file is mapped into memory where its format allows it.

    >>> import tempfile, torch
    >>> path = Path(tempfile.mkdtemp()) / "last.ckpt"
    >>> torch.save({"epoch": 3, "state_dict": {"module.lin.weight": torch.ones(2)}}, path)
    >>> read_pickle(path)
    {'lin.weight': tensor([1., 1.])}
    """
    from torch import Tensor

    loaded = _state_dict(path, _loaded(path))
    tensors = {str(key): value.detach() for key, value in loaded.items() if isinstance(value, Tensor)}
    problems = Problems()
    for key, tensor in tensors.items():
        if reason := _why_not_storable(tensor):
            problems.add(f"'{key}' is {reason}, which is not handled", "save it as a dense float tensor")
    problems.raise_any(f"'{path}' cannot be converted")
    while prefix := next((p for p in _WRAPPERS if all(key.startswith(p) for key in tensors)), ""):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _loaded(path: Path) -> Any:
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"holds {found[1]}" if found else "is not a file of tensors"
        raise PimergeError(
            f"'{path}' {what}, and reading anything but tensors could run code (torch.load refuses it with "
            "weights_only=True)",
            _OPENED_BY_ITS_WRITER if found else _AGAIN,
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        if "TorchScript" in reason:
            raise PimergeError(
                f"'{path}' is a TorchScript program, not a file of tensors", _OPENED_BY_ITS_WRITER
            ) from error
        raise PimergeError(f"'{path}' is damaged or not a file of torch.save ({reason})", _AGAIN) from error


def _state_dict(path: Path, loaded: Any) -> Mapping[Any, Any]:
    """Find the mapping of names to tensors in what a training saved."""
    from torch import Tensor

    if not isinstance(loaded, Mapping):
        raise PimergeError(
            f"'{path}' holds a {type(loaded).__name__}, expected names and tensors", _OPENED_BY_ITS_WRITER
        )
    if any(isinstance(value, Tensor) for value in loaded.values()):
        return loaded
    inside = {
        str(key): value
        for key, value in loaded.items()
        if isinstance(value, Mapping) and "optim" not in str(key) and _has_tensors(value)
    }
    if len(inside) == 1:
        return _state_dict(path, *inside.values())
    if inside:
        raise PimergeError(
            f"'{path}' holds several state dicts: {', '.join(inside)}",
            "save the one that you mean as a file of its own: torch.save(loaded[NAME], FILE)",
        )
    raise PimergeError(f"'{path}' holds no tensors", _AGAIN)


def _has_tensors(value: Any) -> bool:
    from torch import Tensor

    return isinstance(value, Tensor) or (isinstance(value, Mapping) and any(map(_has_tensors, value.values())))


def _why_not_storable(tensor: Tensor) -> str:
    """Why safetensors, or pimerge, cannot store a tensor; empty if it can."""
    import torch

    if tensor.is_quantized:
        return "quantised by PyTorch"
    if tensor.layout != torch.strided:
        return f"stored as {str(tensor.layout).removeprefix('torch.')}"
    try:
        dtype_name(tensor.dtype)
    except StopIteration:
        return f"of dtype {str(tensor.dtype).removeprefix('torch.')}"
    return ""


def without_tied(tensors: Tensors, tied: Mapping[str, str]) -> tuple[Tensors, list[str]]:
    """Leave out tensors that share the memory of another one, where the model ties them, as ``save_pretrained`` does.

    A copy that the model does not tie is kept: without it, the model would lose its weights.

    Args:
        tied: name of a parameter → name of the one that it is tied to in the model.

    Returns:
        the tensors to write, and the names that are left out.

    >>> import torch
    >>> weight = torch.ones(2)
    >>> without_tied({"embed": weight, "head": weight.view(2), "copy": weight.clone()}, {"head": "embed"})[1]
    ['head']
    """

    def place(tensor: Tensor) -> tuple[object, ...]:
        return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()

    left_out = [
        key
        for key, source in sorted(tied.items())
        if key in tensors and source in tensors and place(tensors[key]) == place(tensors[source])
    ]
    return {key: tensor for key, tensor in tensors.items() if key not in left_out}, left_out
