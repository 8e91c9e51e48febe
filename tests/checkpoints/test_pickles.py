"""Pickles are read without running them, and what is not tensors is refused by name."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pimerge.checkpoints.pickles import read_pickle, weight_pickles
from pimerge.core.errors import PimergeError
from tests.support.numerics import normal


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def plain() -> dict[str, Tensor]:
    return {"a.weight": normal(3, 2), "a.bias": normal(3, seed=1).to(torch.bfloat16), "steps": torch.tensor(7)}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"epoch": 3, "state_dict": tensors, "optimizer_states": [{"exp_avg": torch.ones(2)}]},
        lambda tensors: {"module": {f"module.{key}": value for key, value in tensors.items()}, "optimizer": {"a": {}}},
        lambda tensors: {"model": {f"_orig_mod.module.{key}": value for key, value in tensors.items()}, "lr": 0.1},
        lambda tensors: {**tensors, "_metadata": {"version": 1}},
        lambda tensors: {key: nn.Parameter(value, requires_grad=False) for key, value in tensors.items()},
    ],
)
def test_tensors_are_found_in_what_trainings_save(tmp_path: Path, wrap: Any, zipped: bool) -> None:
    torch.save(wrap(plain()), tmp_path / "last.ckpt", _use_new_zipfile_serialization=zipped)
    found = read_pickle(tmp_path / "last.ckpt")
    assert list(found) == list(plain())
    for key, tensor in plain().items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)


def test_code_is_not_run_but_named(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "b": Trap(f"touch {tmp_path}/ran")}, tmp_path / "trap.bin")
    with pytest.raises(
        PimergeError, match=r"holds (posix|nt)\.system, and reading anything but tensors could run code"
    ):
        read_pickle(tmp_path / "trap.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda path: torch.save({"a": torch.ones(1), "args": argparse.Namespace(x=1)}, path), "argparse.Namespace"),
        (lambda path: torch.save(nn.Linear(2, 2), path), "holds torch.nn.modules.linear.Linear"),
        (lambda path: torch.jit.script(nn.Linear(2, 2)).save(path), "TorchScript"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: torch.save({"epoch": 3}, path), "holds no tensors"),
        (lambda path: torch.save([torch.ones(1)], path), "holds a list"),
        (lambda path: torch.save({"ema": plain(), "model": plain()}, path), "several state dicts: ema, model"),
        (lambda path: torch.save({"a": torch.ones(2, 2).to_sparse()}, path), "'a' is stored as sparse_coo"),
        (lambda path: torch.save({"a": torch.ones(2, dtype=torch.complex64)}, path), "'a' is of dtype complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_anything_else_is_refused(tmp_path: Path, save: Any, message: str) -> None:
    save(tmp_path / "x.bin")
    with pytest.raises(PimergeError, match=message):
        read_pickle(tmp_path / "x.bin")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    torch.save(plain(), tmp_path / "x.bin")
    content = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(PimergeError, match=r"x\.bin' is damaged"):
        read_pickle(tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"a": [1]}, protocol=4))
    with pytest.raises(PimergeError, match=r"x\.bin'"):
        read_pickle(tmp_path / "x.bin")


def test_states_of_a_training_are_no_weights(tmp_path: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt"):
        (tmp_path / name).touch()
    assert weight_pickles(tmp_path) == []
    (tmp_path / "pytorch_model.bin").touch()
    assert [path.name for path in weight_pickles(tmp_path)] == ["pytorch_model.bin"]
    (tmp_path / "adapter_model.bin").touch()  # as older versions of the Trainer leave both
    assert [path.name for path in weight_pickles(tmp_path)] == ["adapter_model.bin"]
