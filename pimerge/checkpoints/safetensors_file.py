"""Read and write safetensors files, one tensor at a time, in the memory of one tensor.

Files are read and written without memory mapping: the pages of a mapped file count as memory of the process once they
have been read, and the library's ``save`` needs all tensors at once.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from pimerge.checkpoints.dtypes import as_read, dtype_name, numbers_of, size_of, torch_dtype
from pimerge.core.errors import PimergeError
from pimerge.core.files import require_no_device, sha256_bytes, sha256_file, sha256_files

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

PIECE = 16 * 2**20  # bytes of a large tensor that are in memory at once where it is not needed whole
_BEGINNING_BYTES = 2**18
_ENTRY_BYTES = 160  # bytes of a tensor's header entry without its name: dtype, shape and offsets


class Entry(NamedTuple):
    """The location of one tensor: safetensors' name of its dtype, shape, and bytes from ``start`` to ``end``.

    Attributes:
        path: the file that holds it; None for the file at :attr:`TensorFile.path`.
        transposed: whether the file holds the transpose of the matrix of this shape.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    path: Path | None = None
    transposed: bool = False


@dataclass(frozen=True)
class TensorFile:
    """Tensors to read: a safetensors file (see :func:`open_tensors`), or a view of one or more files.

    A view has other keys, leaves tensors out, transposes matrices or joins shards: only ``entries`` differs.

    Attributes:
        entries: key → location of its tensor, in the order of the file.
        metadata: the ``__metadata__`` of its header.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)

    @cached_property
    def files(self) -> list[Path]:
        """The files that hold the tensors, in alphabetical order."""
        return sorted({entry.path or self.path for entry in self.entries.values()}) or [self.path]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file; of several files, the SHA-256 of their hashes."""
        if len(self.files) == 1:
            return sha256_file(self.files[0])
        return sha256_bytes("".join(sha256_files(self.files)).encode())

    @cached_property
    def beginning(self) -> str:
        """SHA-256 of the header and the first tensors, which distinguishes most files without reading them."""
        starts = []
        for path in self.files:
            with path.open("rb") as file:
                starts.append(file.read(_BEGINNING_BYTES))
        return sha256_bytes(b"".join(starts))

    def read(self, key: str) -> Tensor:
        """Read one tensor; numbers of 8 bits are converted to bfloat16 without loss."""
        entry = self.entries[key]
        if entry.transposed:
            return self._read_stored(entry, 0, math.prod(entry.shape)).view(entry.shape[::-1]).T.contiguous()
        return self.read_part(key, 0, math.prod(entry.shape)).view(entry.shape)

    def read_part(self, key: str, start: int, stop: int) -> Tensor:
        """Read the numbers from ``start`` to ``stop`` of the flattened tensor."""
        entry = self.entries[key]
        return self.read(key).view(-1)[start:stop] if entry.transposed else self._read_stored(entry, start, stop)

    def _read_stored(self, entry: Entry, start: int, stop: int) -> Tensor:
        import torch

        size = (entry.end - entry.start) // max(1, math.prod(entry.shape))
        data = torch.empty((stop - start) * size, dtype=torch.uint8)
        with self._opened() as fill:
            fill(entry, start * size, bytes_of(data))
        return data.view(torch_dtype(entry.dtype)).to(as_read(entry.dtype))

    def arrays(self, keys: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Read several tensors; floats of 16 and 8 bits are converted to float32 without loss."""
        import numpy as np

        found = {}
        with self._opened() as fill:
            for key in keys:
                entry = self.entries[key]
                data = np.empty(entry.end - entry.start, np.uint8)
                fill(entry, 0, data.data)
                numbers = numbers_of(data, entry.dtype)
                found[key] = numbers.reshape(entry.shape[::-1]).T if entry.transposed else numbers.reshape(entry.shape)
        return found

    def pieces(self, key: str) -> Iterator[memoryview | bytearray]:
        """Yield the bytes of one tensor of any dtype, at most :data:`PIECE` at once unless it is transposed."""
        entry = self.entries[key]
        if entry.transposed:
            yield bytes_of(self.read(key))
            return
        for start in range(0, entry.end - entry.start, PIECE):
            data = bytearray(min(PIECE, entry.end - entry.start - start))
            with self._opened() as fill:
                fill(entry, start, memoryview(data))
            yield data

    @contextmanager
    def _opened(self) -> Iterator[Callable[[Entry, int, memoryview], None]]:
        """Yield a function that fills a buffer with an entry's bytes from an offset; each file is opened once."""
        with ExitStack() as stack:
            opened: dict[Path, int] = {}

            def fill(entry: Entry, offset: int, buffer: memoryview) -> None:
                path = entry.path or self.path
                if path not in opened:
                    opened[path] = stack.enter_context(path.open("rb", buffering=0)).fileno()
                done = 0
                while done < len(buffer):  # a call reads at most 2 GiB
                    got = os.preadv(opened[path], [buffer[done:]], entry.start + offset + done)
                    if not got:
                        raise PimergeError(f"'{path}' became shorter while it was read", "run the command again")
                    done += got

            try:
                yield fill
            except OSError as error:
                raise PimergeError(f"cannot read '{error.filename or self.path}': {error.strerror}") from error


def open_tensors(path: Path) -> TensorFile:
    """Open a safetensors file and check its header; no tensor is read."""
    from safetensors import SafetensorError, safe_open

    require_no_device(path)
    try:
        with safe_open(str(path), framework="np"):  # the library checks sizes, offsets and the file's length
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.EINVAL):
            raise PimergeError(f"cannot read '{path}': {os.strerror(error.errno or 0)}") from error
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


def joined(path: Path, files: Sequence[TensorFile]) -> TensorFile:
    """The tensors of several files as one.

    Args:
        path: their index, which names them.
    """
    entries = {
        key: entry._replace(path=entry.path or file.path) for file in files for key, entry in file.entries.items()
    }
    return TensorFile(path, entries, {name: text for file in files for name, text in file.metadata.items()})


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf.

    ``aminmax`` propagates NaN and is many times faster than ``isfinite`` over all numbers.

    >>> import torch
    >>> [is_finite(torch.tensor([1.0, x], dtype=torch.bfloat16)) for x in (-3e38, float("inf"), -float("nan"))]
    [True, False, False]
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(value) for value in tensor.detach().aminmax())


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
        """Write one tensor; wide dtypes come before narrow ones, so that each starts at a multiple of its item size."""
        self.add_pieces(key, dtype_name(tensor.dtype), tuple(tensor.shape), [bytes_of(tensor)])

    def add_all(self, tensors: Mapping[str, Tensor]) -> None:
        """Write several tensors, wide dtypes first."""
        for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
            self.add(key, tensor)

    def add_pieces(
        self, key: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[memoryview | bytearray]
    ) -> None:
        """Write one tensor whose bytes come in pieces."""
        assert key not in self._entries
        assert self._end % size_of(dtype) == 0, f"{key} would not start at a multiple of its item size"
        start = self._end
        for data in pieces:
            self._file.write(data)
            self._end += len(data)
        self._entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, self._end]}

    def finish(self) -> None:
        """Write the header into the space reserved for it, padded with blanks."""
        document = {"__metadata__": self._metadata, **self._entries}
        header = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(header) <= self._reserved, "unexpected keys were written"
        self._file.seek(0)
        self._file.write(self._reserved.to_bytes(8, "little") + header.ljust(self._reserved))


@contextmanager
def writing_tensors(
    path: Path, keys: Iterable[str], metadata: Mapping[str, str] | None = None
) -> Iterator[TensorWriter]:
    """Write a safetensors file, one tensor at a time; it is on the disk when the block ends.

    Args:
        keys: the keys of all tensors that may be written; they determine the space reserved for the header.
        metadata: entries of ``__metadata__`` beside the format.

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
    data = flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)
    return memoryview(data.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
