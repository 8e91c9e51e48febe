"""Names of dtypes in safetensors, torch and NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


FLOATS = ("F64", "F32", "F16", "BF16")
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
"""Floating-point numbers of 8 bits, which bfloat16 represents without loss."""
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_NAMES = {  # names in torch and NumPy; NumPy has no bfloat16
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
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


def as_read(name: str) -> torch.dtype:
    """The dtype of a tensor after it is read: bfloat16 for floats of 8 bits, which torch hardly computes with.

    >>> as_read("F8_E4M3"), as_read("F16")
    (torch.bfloat16, torch.float16)
    """
    return torch_dtype("BF16" if name in EIGHT_BITS else name)


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


def numbers_of(data: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Interpret bytes as numbers of a dtype, given by safetensors' name of it; floats of 16 and 8 bits as float32."""
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype in EIGHT_BITS:  # NumPy has none
        import torch

        found: NDArray[Any] = torch.from_numpy(data).view(torch_dtype(dtype)).float().numpy()
        return found
    numbers = data.view(numpy_name(dtype))
    return numbers.astype(np.float32) if dtype == "F16" else numbers
