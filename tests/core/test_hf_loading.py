"""Hostile models and data: nothing of them runs, and nothing outside their folder is read."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pimerge.adapters.base_fit import check_fits_on_disk
from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from pimerge.core.hf_loading import load_config, require_hub_data
from pimerge.tasks.task import open_task
from tests.support.experts import MakeExpert
from tests.support.loading import load
from tests.support.text_rows import make_task, problem_of


@pytest.fixture
def base(vit_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a base to change; whoever asks on standard input is told yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return Path(shutil.copytree(vit_base, tmp_path / "vit"))


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_code_beside_a_config_never_runs(
    base: Path, parity_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    (base / "own.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import ViTConfig as C\n")
    expert, task = open_expert(make_expert(tmp_path / "expert", base=base)), open_task(parity_task)
    edit(base, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForImageClassification": "own.C"})
    with pytest.raises(PimergeError, match="code of its own"):
        check_fits_on_disk(expert, task)
    with pytest.raises(PimergeError, match="code of its own"):
        load(base, parity_task)
    assert not ran.exists()


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_that_names_a_kernel_of_the_hub_is_refused(base: Path, field: str) -> None:
    edit(base, **{field: "someone/kernel"})
    with pytest.raises(PimergeError, match="someone/kernel"):
        load_config(base)


def test_a_base_of_pickles_alone_is_refused_and_the_converter_is_named(base: Path, parity_task: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(PimergeError, match=r"pytorch_model\.bin.*\n.*pimerge convert"):
        load(base, parity_task)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", 3])
def test_an_index_of_a_base_names_files_of_its_folder_only(base: Path, parity_task: Path, place: Any) -> None:
    (base / "model.safetensors").rename(base.parent / "model.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(PimergeError, match="outside its folder"):
        load(base, parity_task)


@pytest.mark.parametrize(
    "name", ["csv", "json", "parquet", "text", "pandas", "imagefolder", "missing.csv", "../up", ""]
)
def test_data_that_are_no_file_are_no_format_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.csv").write_text("text,label\nof the working folder,a\n")
    folder = tmp_path / "task"
    folder.mkdir()
    task = open_task(make_task(folder, [], data=name))
    assert "working folder" not in problem_of(lambda: task.rows("train"))


def test_a_folder_in_the_working_folder_is_no_data_set_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    with pytest.raises(PimergeError, match="working folder"):
        require_hub_data("org/name")
    require_hub_data("org/other")
    require_hub_data("imdb")
