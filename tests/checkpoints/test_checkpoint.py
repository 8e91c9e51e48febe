"""Full checkpoints: what is opened, refused and written again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from pimerge.checkpoints import safetensors_file
from pimerge.checkpoints.base import Base
from pimerge.checkpoints.checkpoint import open_checkpoint, require_weights
from pimerge.checkpoints.writer import write_like
from pimerge.core.errors import PimergeError
from tests.support.bases import save_base
from tests.support.checkpoints import contents
from tests.support.numerics import normal

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(bert_base: Path, tmp_path: Path) -> Path:
    """The tiny BERT in several shards."""
    folder = tmp_path / "sharded"
    BertModel.from_pretrained(bert_base).save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_an_unchanged_copy_has_the_same_bytes(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "PIECE", 40)  # so that tensors come in pieces
    (sharded / "generation_config.json").write_text('{"a":   1}')
    (sharded / "README.md").write_text("old")
    (sharded / "pytorch_model.bin").write_bytes(b"pickle")
    (sharded / "additional_chat_templates").mkdir()
    (sharded / "additional_chat_templates" / "x.jinja").write_text("{{ x }}")
    (tmp_path / "out").mkdir()
    checkpoint = open_checkpoint(sharded)
    size = write_like(checkpoint, tmp_path / "out", lambda key: None)
    before, after = contents(sharded), contents(tmp_path / "out")
    assert set(before) - set(after) == {"README.md", "pytorch_model.bin"}
    plain = [name for name in after if not name.endswith(".safetensors")]
    assert {name: after[name] for name in plain} == {name: before[name] for name in plain}
    again = open_checkpoint(tmp_path / "out")
    assert list(again.home) == list(checkpoint.home)
    assert [file.path.name for file in again.files] == [file.path.name for file in checkpoint.files]
    assert all(list(again.home[key].pieces(key)) == list(checkpoint.home[key].pieces(key)) for key in checkpoint.home)
    assert size == checkpoint.size == again.size


def test_identity_is_the_bases(sharded: Path) -> None:
    assert Base("x", None, sharded).identity == "sha256:" + open_checkpoint(sharded).sha256


def test_dtype_changes_floats_and_the_config_alone(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", normal(5, 3))
    save_file({"a": normal(5, 3), "n": torch.arange(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"dtype": "float32"}')
    (tmp_path / "out").mkdir()
    write_like(open_checkpoint(folder), tmp_path / "out", lambda key: None, dtype=torch.bfloat16)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["a"], normal(5, 3).bfloat16())
    assert torch.equal(after["n"], torch.arange(3))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "bfloat16"}


def test_single_file_keeps_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": normal(2)}, path, {"modelspec.architecture": "sdxl"})
    write_like(open_checkpoint(path), tmp_path / "y.safetensors", lambda key: None)
    assert open_checkpoint(tmp_path / "y.safetensors").files[0].metadata["modelspec.architecture"] == "sdxl"


def test_added_tensors_of_any_dtype_are_read_back(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", normal(3).bfloat16())
    (tmp_path / "out").mkdir()
    value = normal(2).double()
    write_like(
        open_checkpoint(folder),
        tmp_path / "out",
        lambda key: iter([value]) if key == "b" else None,
        new={"b": ("F64", (2,))},
    )
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["b"], value)


def test_diffusers_names_and_variants(tmp_path: Path) -> None:
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"):
        assert list(open_checkpoint(save_base(tmp_path / name, normal(2), name)).home) == ["weight"]


def test_broken_indexes_are_reported_at_once(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first, second, third = sorted(set(index["weight_map"].values()))[:3]
    (sharded / first).unlink()
    lost = next(key for key, place in index["weight_map"].items() if place == second)
    save_file({k: v for k, v in load_file(sharded / second).items() if k != lost}, sharded / second)
    save_file({**load_file(sharded / third), lost: normal(2)}, sharded / third)
    with pytest.raises(PimergeError) as error:
        open_checkpoint(sharded)
    assert f"'{first}', which does not exist" in str(error.value)
    assert f"'{second}' lacks '{lost}'" in str(error.value)
    assert f"'{third}' holds '{lost}', but the index has it in '{second}'" in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("pytorch_model.bin",), "holds pickles"),
        (("adapter_config.json",), "is an adapter"),
        (("model_index.json",), "pipeline of diffusers"),
        ((), "holds no weights"),
    ],
)
def test_folders_without_safetensors_are_refused(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(PimergeError, match=message):
        open_checkpoint(tmp_path)


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_base(tmp_path, normal(2), name)
    with pytest.raises(PimergeError, match=r"no model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)


def test_pickles_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(PimergeError, match="is a pickle"):
        open_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(PimergeError, match="there is no checkpoint"):
        open_checkpoint(tmp_path / "none")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(PimergeError, match="holds no tensors"):
        open_checkpoint(tmp_path / "empty.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("q.weight", torch.zeros(2, 2, dtype=torch.int8)),
        ("q.qweight", torch.zeros(2, 2, dtype=torch.int32)),
        ("q.weight.absmax", torch.zeros(2)),
        ("q.scale", torch.zeros(2, dtype=torch.float8_e4m3fn)),
    ],
)
def test_quantised_checkpoints_are_refused_by_name(tmp_path: Path, key: str, value: torch.Tensor) -> None:
    save_file({key: value, "p.weight": normal(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(PimergeError, match="quantised: " + key):
        require_weights(open_checkpoint(tmp_path / "x.safetensors"))


def test_quantisation_in_the_config_is_refused(tmp_path: Path) -> None:
    folder = save_base(tmp_path, normal(2, 2))
    require_weights(open_checkpoint(folder))
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(PimergeError, match="quantization_config"):
        require_weights(open_checkpoint(folder))
