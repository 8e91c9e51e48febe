"""The dequantised weights of a checkpoint that bitsandbytes quantised, computed piece by piece as they are read.

Layouts (``QuantState.as_dict`` and ``Linear8bitLt`` of bitsandbytes): in 4 bits, ``W.weight`` holds two numbers in each
byte; ``.absmax``, ``.quant_map`` and ``.quant_state.bitsandbytes__nf4`` (JSON) beside it hold the largest number of
each block of the flattened weight, the code, and shape and dtype. In 8 bits, ``W.SCB`` holds that of each row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pimerge.checkpoints.checkpoint import Checkpoint
from pimerge.checkpoints.dtypes import FLOATS, dtype_name, size_of
from pimerge.checkpoints.quantised import BITSANDBYTES, method_of
from pimerge.checkpoints.safetensors_file import PIECE, Entry, TensorFile, bytes_of
from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    from torch import Tensor

_STATE = ".quant_state.bitsandbytes__"
_COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
Read = Callable[[str], "Tensor"]


@dataclass(frozen=True)
class _Weight:
    """A quantised weight.

    Attributes:
        dtype: safetensors' name of its dtype before it was quantised.
        is_turned: whether the model has the transpose of this matrix (Conv1D).
        state: the content of its quantisation state; empty in 8 bits.
    """

    dtype: str
    shape: tuple[int, ...]
    is_turned: bool
    state: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class DequantisedFile(TensorFile):
    """A view of a quantised file: the weights as floating-point numbers, without what belongs to their quantisation.

    Attributes:
        stored: the file.
        weights: key → quantised weight.
        companion: reads any tensor of the checkpoint.
    """

    stored: TensorFile
    weights: Mapping[str, _Weight]
    companion: Read

    def read(self, key: str) -> Tensor:
        """Read one tensor."""
        weight = self.weights.get(key)
        if weight is None:
            return super().read(key)
        whole = self._numbers(key, weight, 0, math.prod(weight.shape)).view(weight.shape)
        return whole.T.contiguous() if weight.is_turned else whole

    def read_part(self, key: str, start: int, stop: int) -> Tensor:
        """Read the numbers from ``start`` to ``stop`` of the flattened tensor."""
        weight = self.weights.get(key)
        if weight is None:
            return super().read_part(key, start, stop)
        return self.read(key).view(-1)[start:stop] if weight.is_turned else self._numbers(key, weight, start, stop)

    def pieces(self, key: str) -> Iterator[memoryview | bytearray]:
        """Yield the bytes of one tensor of any dtype."""
        weight = self.weights.get(key)
        if weight is None:
            yield from super().pieces(key)
        elif weight.is_turned:
            yield bytes_of(self.read(key))
        else:
            count, step = math.prod(weight.shape), PIECE // size_of(weight.dtype)
            for start in range(0, count, step):
                yield bytes_of(self._numbers(key, weight, start, min(start + step, count)))

    @cached_property
    def _states(self) -> dict[str, Any]:
        """Key → bitsandbytes' state of a weight in 4 bits, with the blocks' scales dequantised."""
        return {}

    def _numbers(self, key: str, weight: _Weight, start: int, stop: int) -> Tensor:
        return self._in_4_bits(key, weight, start, stop) if weight.state else self._in_8_bits(key, weight, start, stop)

    def _in_4_bits(self, key: str, weight: _Weight, start: int, stop: int) -> Tensor:
        import torch
        from bitsandbytes import functional

        state = self._state(key, weight)
        block, count = state.blocksize, math.prod(weight.shape)
        first, last = start // block * block, min(count, -(-stop // block) * block)
        size = size_of(self.stored.entries[key].dtype)
        packed = self.stored.read_part(key, first // 2 // size, -(-last // 2) // size)
        # one row: on a CPU, bitsandbytes 0.50 takes the wrong blocks if they do not divide the columns
        scales = state.absmax[first // block : -(-last // block)]
        part = functional.QuantState(
            absmax=scales,
            shape=torch.Size((last - first,)),
            code=state.code,
            blocksize=block,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        numbers: Tensor = functional.dequantize_4bit(packed.view(torch.uint8).view(-1, 1), part).view(-1)
        return numbers[start - first : stop - first]

    def _state(self, key: str, weight: _Weight) -> Any:
        from bitsandbytes import functional

        if key not in self._states:
            kind = next(name for name in weight.state if name.startswith("bitsandbytes__"))
            parts = {name: self.companion(f"{key}.{name}") for name in weight.state if not name.startswith("bits")}
            packed = {f"quant_state.{kind}": self.companion(f"{key}.quant_state.{kind}")}
            state = functional.QuantState.from_dict({**parts, **packed}, device="cpu")
            if state.nested:
                absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
                state.absmax, state.nested = absmax.float(), False
            self._states.clear()  # one tensor at a time
            self._states[key] = state
        return self._states[key]

    def _in_8_bits(self, key: str, weight: _Weight, start: int, stop: int) -> Tensor:
        from bitsandbytes import functional

        from pimerge.checkpoints.dtypes import torch_dtype

        columns = math.prod(weight.shape[1:])
        first, last = start // columns, -(-stop // columns)
        packed = self.stored.read_part(key, first * columns, last * columns).view(-1, columns)
        scales = self.companion(f"{key.removesuffix('.weight')}.SCB")[first:last]
        numbers: Tensor = functional.int8_vectorwise_dequant(packed, scales)
        return numbers.view(-1)[start - first * columns : stop - first * columns].to(torch_dtype(weight.dtype))


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """A view of a checkpoint that bitsandbytes quantised, with floating-point weights and the config that fits them."""
    dtypes = {key: checkpoint.entry(key).dtype for key in checkpoint.home}
    if method_of(checkpoint.config, dtypes) != BITSANDBYTES:
        raise PimergeError(
            f"the checkpoint '{checkpoint.path}' was not quantised by bitsandbytes",
            "leave out --dequantize; of a checkpoint that another tool quantised, use the unquantised original",
        )
    _require_bitsandbytes()
    weights = _weights(checkpoint)
    dropped = {key for key in checkpoint.home if _belongs(key, weights)}
    files = []
    for file in checkpoint.files:
        entries = {key: _entry(key, entry, weights) for key, entry in file.entries.items() if key not in dropped}
        files.append(
            DequantisedFile(file.path, entries, file.metadata, stored=file, weights=weights, companion=checkpoint.read)
        )
    config = {name: value for name, value in checkpoint.config.items() if name != "quantization_config"}
    index = dict(checkpoint.index)
    if index:
        index["weight_map"] = {key: place for key, place in index["weight_map"].items() if key not in dropped}
    return replace(checkpoint, files=tuple(files), config=config, index=index, is_view=True)


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise PimergeError(
            "--dequantize needs bitsandbytes, which is not installed", "pip install 'pimerge[quantised]'"
        ) from error


def _weights(checkpoint: Checkpoint) -> dict[str, _Weight]:
    from pimerge.checkpoints.key_mapping import is_fan_in_first, names_of  # imports torch and transformers

    names = names_of(checkpoint)
    found = {}
    for key in checkpoint.home:
        module = key.removesuffix(".weight")
        is_turned = bool(names.known) and is_fan_in_first(names, module)
        parts = [each for each in checkpoint.home if each.startswith(f"{key}.")] if key.endswith(".weight") else []
        states = [each for each in parts if each.startswith(key + _STATE)]
        if states:
            state = json.loads(bytes(checkpoint.read(states[0]).tolist()))
            slots = {each.removeprefix(f"{key}.").removeprefix("quant_state."): True for each in parts}
            found[key] = _Weight(_dtype(state["dtype"]), tuple(state["shape"]), is_turned, slots)
        elif key.endswith(".weight") and f"{module}.SCB" in checkpoint.home:
            stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float16"
            found[key] = _Weight(_dtype(stated), checkpoint.entry(key).shape, is_turned, {})
    return found


def _dtype(name: str) -> str:
    import torch

    return dtype_name(getattr(torch, name.removeprefix("torch.")))


def _entry(key: str, entry: Entry, weights: Mapping[str, _Weight]) -> Entry:
    weight = weights.get(key)
    if weight is None:
        return entry
    assert weight.dtype in FLOATS
    shape = weight.shape[::-1] if weight.is_turned else weight.shape
    return Entry(weight.dtype, shape, 0, math.prod(shape) * size_of(weight.dtype))


def _belongs(key: str, weights: Mapping[str, _Weight]) -> bool:
    """Whether a tensor belongs to the quantisation of a weight."""
    module, _, last = key.rpartition(".")
    if _STATE in key:
        return key.partition(_STATE)[0] in weights
    return (f".{last}" in _COMPANIONS and module in weights) or (
        last in ("SCB", "weight_format") and f"{module}.weight" in weights
    )
