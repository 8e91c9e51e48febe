"""safetensors files, one tensor at a time in the memory of one tensor.

Plain reads and writes instead of mapped pages: a mapped file counts as the process's own memory once it has
been read, and the library's ``save`` wants every tensor at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from pimerge.checkpoints.dtypes import dtype_name, numpy_name, size_of, torch_dtype
from pimerge.core.errors import PimergeError
from pimerge.core.files import sha256_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

PIECE = 16 * 2**20  # bytes of a large tensor that are held at once where it is not needed whole
_BEGINNING_BYTES = 2**18
_ENTRY_BYTES = 160  # of the header beside a tensor's name: dtype, shape and offsets of any size


class Entry(NamedTuple):
    """Where one tensor lies: its dtype as safetensors names it, shape, and bytes from ``start`` to ``end``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file to read from; see :func:`open_tensors`.

    Attributes:
        entries: key → where its tensor lies, in the order of the file.
        metadata: what the file says of itself.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)

    @cached_property
    def beginning(self) -> str:
        """SHA-256 of the header and the first tensors: tells most files apart without reading them."""
        with self.path.open("rb") as file:
            return sha256_bytes(file.read(_BEGINNING_BYTES))

    def read(self, key: str) -> Tensor:
        """Read one tensor."""
        import torch

        entry = self.entries[key]
        data = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        with self._opened() as file:
            self._fill(file, entry.start, _bytes_of(data))
        return data.view(torch_dtype(entry.dtype)).view(entry.shape)

    def read_part(self, key: str, start: int, stop: int) -> Tensor:
        """Read the numbers from ``start`` to ``stop`` of a tensor, as if it were flat."""
        import torch

        entry = self.entries[key]
        size = (entry.end - entry.start) // max(1, math.prod(entry.shape))
        data = torch.empty((stop - start) * size, dtype=torch.uint8)
        with self._opened() as file:
            self._fill(file, entry.start + start * size, _bytes_of(data))
        return data.view(torch_dtype(entry.dtype))

    def arrays(self, keys: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Read several tensors; F16 and BF16 become float32, which holds their numbers.

        The file is opened once, and neighbours are read at once: of small tensors it is the calls that take time.
        """
        import numpy as np

        chosen = {key: self.entries[key] for key in keys}
        found = {}
        with self._opened() as file:
            for run in _runs(chosen.items()):
                start = run[0][1].start
                data = np.empty(run[-1][1].end - start, np.uint8)
                self._fill(file, start, data.data)
                for key, entry in run:
                    numbers = _numbers(data[entry.start - start : entry.end - start], entry.dtype)
                    found[key] = numbers.reshape(entry.shape)
        return {key: found[key] for key in chosen}

    def pieces(self, key: str) -> Iterator[bytearray]:
        """The bytes of one tensor, whatever its dtype, at most :data:`PIECE` of them at once."""
        entry = self.entries[key]
        for start in range(0, entry.end - entry.start, PIECE):
            data = bytearray(min(PIECE, entry.end - entry.start - start))
            with self._opened() as file:
                self._fill(file, entry.start + start, memoryview(data))
            yield data

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            with self.path.open("rb", buffering=0) as file:
                yield file.fileno()
        except OSError as error:
            raise PimergeError(f"cannot read '{self.path}': {error.strerror}") from error

    def _fill(self, file: int, start: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):  # the kernel gives at most 2 GiB at once
            got = os.preadv(file, [buffer[done:]], start + done)
            if not got:
                raise PimergeError(f"'{self.path}' became shorter while it was read", "run the command again")
            done += got


def open_tensors(path: Path) -> TensorFile:
    """Open a safetensors file: its header is read and checked, no tensor is."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np"):  # the library checks sizes, offsets and the file's length
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise PimergeError(
            f"'{path}' is truncated or not a safetensors file ({error})", "copy or save the file again"
        ) from error
    metadata = header.pop("__metadata__", None) or {}
    begin = 8 + size
    places = sorted((*found["data_offsets"], key) for key, found in header.items())
    entries = {
        key: Entry(header[key]["dtype"], tuple(header[key]["shape"]), begin + start, begin + end)
        for start, end, key in places
    }
    return TensorFile(path, entries, metadata)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf.

    Both have every bit of the exponent set, so the largest bit pattern without its sign tells, many times faster
    than ``isfinite`` in 16 bits.

    >>> import torch
    >>> [is_finite(torch.tensor([1.0, x], dtype=torch.bfloat16)) for x in (-3e38, float("inf"), -float("nan"))]
    [True, False, False]
    """
    import numpy as np
    import torch

    known = {
        torch.float64: (torch.int64, 0x7FF << 52),
        torch.float32: (torch.int32, 0xFF << 23),
        torch.bfloat16: (torch.int16, 0xFF << 7),
        torch.float16: (torch.int16, 0x1F << 10),
    }
    if tensor.dtype not in known or not tensor.numel():
        return True
    integers, exponent = known[tensor.dtype]
    # numpy: torch hands so few numbers to its threads, which takes longer than the work on a busy machine
    bits = tensor.detach().cpu().contiguous().view(integers).numpy()
    return bool((bits & np.iinfo(bits.dtype).max).max() < exponent)


class TensorWriter:
    """A safetensors file that grows by one tensor at a time; see :func:`writing_tensors`."""

    def __init__(self, file: BinaryIO, reserved: int, metadata: Mapping[str, str]) -> None:
        self._file = file
        self._reserved = reserved
        self._metadata = dict(metadata)
        self._entries: dict[str, dict[str, object]] = {}
        self._end = 0
        file.seek(8 + reserved)

    @property
    def written(self) -> int:
        """Bytes of tensors written so far."""
        return self._end

    def add(self, key: str, tensor: Tensor) -> None:
        """Write one tensor; wide dtypes go before narrow ones, so that each starts at a multiple of its size."""
        self.add_bytes(key, dtype_name(tensor.dtype), tuple(tensor.shape), bytes_of(tensor))

    def add_bytes(self, key: str, dtype: str, shape: tuple[int, ...], data: memoryview | bytearray) -> None:
        """Write the bytes of one tensor."""
        self.add_pieces(key, dtype, shape, [data])

    def add_pieces(
        self, key: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[memoryview | bytearray]
    ) -> None:
        """Write the bytes of one tensor that come in pieces."""
        assert key not in self._entries
        assert self._end % size_of(dtype) == 0, f"{key} would start between two numbers"
        start = self._end
        for data in pieces:
            self._file.write(data)
            self._end += len(data)
        self._entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, self._end]}

    def finish(self) -> None:
        """Write the header into the room that was kept for it, padded with blanks."""
        document = {"__metadata__": self._metadata, **self._entries}
        header = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(header) <= self._reserved, "keys were written that were not announced"
        self._file.seek(0)
        self._file.write(self._reserved.to_bytes(8, "little") + header.ljust(self._reserved))


@contextmanager
def writing_tensors(
    path: Path, keys: Iterable[str], metadata: Mapping[str, str] | None = None
) -> Iterator[TensorWriter]:
    """Write a safetensors file, one tensor at a time; it is on the disk when the block ends.

    Args:
        keys: of the tensors that may come, so that there is room for the header.
        metadata: what the file says of itself, besides its format.

    >>> import tempfile, torch
    >>> from safetensors.torch import load_file
    >>> path = Path(tempfile.mkdtemp()) / "x.safetensors"
    >>> with writing_tensors(path, ["a"]) as writer:
    ...     writer.add("a", torch.ones(2))
    >>> load_file(path)["a"].tolist()
    [1.0, 1.0]
    """
    metadata = {"format": "pt", **(metadata or {})}
    reserved = (
        64
        + len(json.dumps(metadata).encode())
        + sum(len(json.dumps(key, ensure_ascii=False).encode()) + _ENTRY_BYTES for key in keys)
    )
    with path.open("wb") as file:
        writer = TensorWriter(file, math.ceil(reserved / 8) * 8, metadata)
        yield writer
        writer.finish()
        file.flush()
        os.fsync(file.fileno())


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, flattened."""
    import torch

    flat = tensor.detach().cpu().contiguous().view(-1)
    return _bytes_of(flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8))


def _runs(entries: Iterable[tuple[str, Entry]]) -> Iterator[list[tuple[str, Entry]]]:
    """Tensors of one dtype that lie side by side in the file, in groups."""
    run: list[tuple[str, Entry]] = []
    for key, entry in sorted(entries, key=lambda item: item[1].start):
        if run and (run[-1][1].end, run[-1][1].dtype) != (entry.start, entry.dtype):
            yield run
            run = []
        run.append((key, entry))
    if run:
        yield run


def _numbers(data: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Bytes as the numbers of a dtype as safetensors names it."""
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    numbers = data.view(numpy_name(dtype))
    return numbers.astype(np.float32) if dtype == "F16" else numbers


def _bytes_of(flat: Tensor) -> memoryview:
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
