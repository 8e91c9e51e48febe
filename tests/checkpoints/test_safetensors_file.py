"""safetensors files, against the library's own reading and writing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pimerge.checkpoints import safetensors_file
from pimerge.checkpoints.dtypes import dtype_name, size_of, torch_dtype
from pimerge.checkpoints.safetensors_file import bytes_of, is_finite, joined, open_tensors, writing_tensors
from pimerge.core.errors import PimergeError
from tests.support.numerics import normal, small

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit patterns, NaN and Inf among them."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).view(shape)


@st.composite
def tensor_maps(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors of any dtype and shape, scalars and empty ones among them, wide dtypes first."""
    keys = draw(st.lists(st.text(min_size=1, max_size=12), unique=True, min_size=1, max_size=6))
    keys = [key for key in keys if key != "__metadata__" and key.isprintable()] or ["k"]
    shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
    dtypes = sorted(draw(st.lists(st.sampled_from(DTYPES), min_size=len(keys), max_size=len(keys))), key=_width)
    return {
        key: random_bits(draw(shapes), dtype, draw(st.integers(0, 99))) for key, dtype in zip(keys, dtypes, strict=True)
    }


def _width(dtype: torch.dtype) -> int:
    return -dtype.itemsize


def widened(tensor: Tensor) -> Tensor:
    """As it is, or in float32 where it has 16 bits of a float."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether dtype, shape and every bit are equal."""
    return (first.dtype, first.shape) == (second.dtype, second.shape) and bytes(bytes_of(first)) == bytes(
        bytes_of(second)
    )


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """All tensors, in order."""
    with writing_tensors(path, tensors, metadata) as writer:
        for key, tensor in tensors.items():
            writer.add(key, tensor)
    return path


@small
@given(tensor_maps())
def test_what_is_written_is_read_by_the_library_and_by_pimerge(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = write(tmp_path / "x.safetensors", tensors, {"of": "a test"})
    library, own = load_file(path), open_tensors(path)
    assert library.keys() == own.entries.keys() == tensors.keys()
    assert own.metadata == {"format": "pt", "of": "a test"}
    for key, tensor in tensors.items():
        assert same_bits(library[key], tensor)
        assert same_bits(own.read(key), tensor)
        assert bytes(bytes_of(tensor)) == b"".join(map(bytes, own.pieces(key)))
    arrays = own.arrays(reversed(tensors))
    assert list(arrays) == list(reversed(tensors))
    for key, array in arrays.items():
        expected = widened(own.read(key)).numpy()
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(array, expected)


@small
@given(tensor_maps())
def test_what_the_library_writes_is_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    own = open_tensors(tmp_path / "x.safetensors")
    assert all(same_bits(own.read(key), tensor) for key, tensor in tensors.items())
    starts = [entry.start for entry in own.entries.values()]
    assert starts == sorted(starts)


def test_parts_and_pieces_are_those_of_the_flat_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "PIECE", 16)
    tensor = normal(5, 7).bfloat16()
    file = open_tensors(write(tmp_path / "x.safetensors", {"pad": normal(3), "a": tensor}))
    assert torch.equal(file.read_part("a", 3, 20), tensor.flatten()[3:20])
    assert file.read_part("a", 4, 4).shape == (0,)
    assert [len(piece) for piece in file.pieces("a")] == [16, 16, 16, 16, 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_becomes_the_same_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    found = open_tensors(write(tmp_path / "x.safetensors", {"a": tensor})).arrays(["a"])["a"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, tensor.float().numpy())
    assert (np.signbit(found) == tensor.float().signbit().numpy()).all()


def test_arrays_open_the_file_once_and_may_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = open_tensors(write(tmp_path / "x.safetensors", {str(i): normal(i, 3) for i in range(5)}))
    opened: list[Path] = []
    original = Path.open

    def watched(path: Path, *args: Any, **options: Any) -> Any:
        opened.append(path)
        return original(path, *args, **options)

    monkeypatch.setattr(Path, "open", watched)
    found = file.arrays(file.entries)
    assert opened == [file.path]
    found["1"] += 1
    assert not np.array_equal(found["1"], file.arrays(["1"])["1"])


def test_what_is_not_contiguous_is_written_as_it_reads(tmp_path: Path) -> None:
    tensor = normal(4, 6).T[1:, ::2]
    assert torch.equal(load_file(write(tmp_path / "x.safetensors", {"a": tensor}))["a"], tensor)


def test_numbers_start_at_a_multiple_of_their_size(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="b would not start at a multiple"):
        write(tmp_path / "x.safetensors", {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(1)})
    file = open_tensors(write(tmp_path / "y.safetensors", {"a": torch.ones(1), "b": torch.ones(3).half()}))
    assert all(entry.start % size_of(entry.dtype) == 0 for entry in file.entries.values())


def write_keys(path: Path, announced: list[str], keys: list[str]) -> None:
    """One number for each key."""
    with writing_tensors(path, announced) as writer:
        for key in keys:
            writer.add(key, torch.ones(1))


def test_a_key_is_written_once_and_announced(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_keys(tmp_path / "x.safetensors", ["a"], ["a", "a"])
    with pytest.raises(AssertionError, match="unexpected keys"):
        write_keys(tmp_path / "y.safetensors", [], [f"a{index}" for index in range(9)])


def test_keys_that_do_not_come_leave_a_file_that_everyone_reads(tmp_path: Path) -> None:
    with writing_tensors(tmp_path / "x.safetensors", ["a", "b" * 500]) as writer:
        writer.add("a", torch.arange(3))
        assert writer.written == 24
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]
    with safe_open(tmp_path / "x.safetensors", "pt") as found:
        assert list(found.keys()) == ["a"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_have_the_names_that_the_library_gives(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1, dtype=dtype)}, tmp_path / "x.safetensors")
    name = open_tensors(tmp_path / "x.safetensors").entries["a"].dtype
    assert (dtype_name(dtype), torch_dtype(name), size_of(name)) == (name, dtype, dtype.itemsize)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf_of_either_sign_are_not_finite_and_the_rest_is(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    finite = [0.0, -0.0, limits.max, limits.min, limits.tiny, limits.smallest_normal / 4, -limits.tiny / 2]
    assert is_finite(torch.tensor(finite, dtype=dtype))
    for value in (math.inf, -math.inf, math.nan, -math.nan):
        for place in range(3):
            tensor = torch.zeros(3, dtype=dtype)
            tensor[place] = value
            assert not is_finite(tensor)
            assert not is_finite(torch.stack([torch.zeros(3, dtype=dtype), tensor], 1)[:, 1])  # not contiguous
    assert is_finite(torch.empty(0, 3, dtype=dtype))


@small
@given(st.sampled_from(FLOATS), st.integers(0, 10_000))
def test_is_finite_agrees_with_torch_on_any_bits(dtype: torch.dtype, seed: int) -> None:
    for value in random_bits((6,), dtype, seed):
        assert is_finite(value.reshape(1)) == bool(value.isfinite())
    exponent = torch.full((2,), math.inf, dtype=dtype).view(BITS[dtype.itemsize])
    assert not is_finite((exponent | seed % 127).view(dtype))  # NaN with any payload


def test_integers_are_finite() -> None:
    assert all(is_finite(torch.full((2,), 1, dtype=dtype)) for dtype in DTYPES if dtype not in FLOATS)


@pytest.mark.parametrize("size", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_refused(size: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": normal(100)})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(PimergeError, match="is truncated or not a safetensors file"):
        open_tensors(path)


def test_a_file_that_is_none_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04" + bytes(200))
    for name in ("x.safetensors", "gone.safetensors"):
        with pytest.raises(PimergeError, match=f"'.*{name}' is truncated or not a safetensors file"):
            open_tensors(tmp_path / name)


def test_a_file_that_changes_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    file = open_tensors(write(tmp_path / "x.safetensors", {"a": normal(100), "b": normal(100)}))
    file.path.write_bytes(file.path.read_bytes()[:-8])
    assert file.read("a").shape == (100,)
    for read in (
        file.read,
        lambda key: list(file.pieces(key)),
        lambda key: file.read_part(key, 9, 100),
        lambda key: file.arrays(["a", key]),
    ):
        with pytest.raises(PimergeError, match="became shorter while it was read"):
            read("b")
    file.path.unlink()
    for read in (file.read, lambda key: file.arrays([key])):
        with pytest.raises(PimergeError, match="cannot read"):
            read("a")


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_view_renames_transposes_and_joins(dtype: torch.dtype, tmp_path: Path) -> None:
    first, second = normal(3, 5).to(dtype), normal(2, 4).to(dtype)
    for name, tensor in (("one", first), ("two", second)):
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    both = joined(tmp_path / "index.json", [open_tensors(tmp_path / f"{name}.safetensors") for name in ("two", "one")])
    one = both.entries["one"]
    turned = one._replace(shape=one.shape[::-1], transposed=True)
    view = replace(both, entries={"new": turned, "two": both.entries["two"]})
    assert same_bits(view.read("new"), first.T.contiguous())
    assert same_bits(view.read("two"), second)
    assert same_bits(view.read_part("new", 2, 7), first.T.reshape(-1)[2:7])
    assert b"".join(view.pieces("new")) == bytes(bytes_of(first.T))
    arrays = view.arrays(["new", "two"])
    np.testing.assert_array_equal(arrays["new"], widened(first).T.numpy())
    np.testing.assert_array_equal(arrays["two"], widened(second).numpy())
    assert view.files == [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
