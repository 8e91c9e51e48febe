"""Names of dtypes in safetensors, torch and NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


FLOATS = ("F64", "F32", "F16", "BF16")
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_NAMES = {  # names in torch and NumPy; NumPy has no bfloat16
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype for a safetensors name.

    >>> torch_dtype("BF16")
    torch.bfloat16
    """
    import torch

    found: torch.dtype = getattr(torch, _NAMES[name])
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype.

    >>> import torch
    >>> dtype_name(torch.bfloat16)
    'BF16'
    """
    return next(name for name, known in _NAMES.items() if known == str(dtype).removeprefix("torch."))


def size_of(dtype: str) -> int:
    """Bytes per number for a safetensors name; 1 for dtypes of a byte or less.

    >>> size_of("BF16"), size_of("BOOL")
    (2, 1)
    """
    return _SIZES.get(dtype, 1)


def numpy_name(dtype: str) -> str:
    """NumPy's and torch's name of a dtype.

    >>> numpy_name("F16")
    'float16'
    """
    return _NAMES[dtype]
