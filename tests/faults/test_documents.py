"""A changed document is used or refused in words, within seconds, whatever was changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from pimerge.checkpoints.base import find_base
from pimerge.core.errors import PimergeError
from pimerge.models.loading import load_base
from pimerge.tasks.task import open_task
from tests.support.fault_jobs import ALL, EMBED, RANK, Workshop
from tests.support.mutations import changed_bytes, json_files, within
from tests.support.warm import answer

BUDGET, SECONDS = (400 if ALL else 12), 5
TWO = "merge experts/a experts/b --head none --dry-run"
FILES = "merge experts/a/adapter_model.safetensors experts/b/adapter_model.safetensors --head none --dry-run"
COMPARE = "compare --target X --seeds 1 --shots 2 --epochs 1 --methods learned --controls head -q"
READERS = {
    "experts/a/adapter_config.json": ("inspect experts/a", TWO),
    "experts/a/README.md": ("merge experts/a experts/b --head none -o out --force",),
    "embeddings.json": (f"{RANK} --force", "inspect experts/a"),
    "ranking.json": ("merge --dry-run",),
    "merged/coefficients.json": (f"{TWO} --coefficients merged/coefficients.json", "report --force"),
    "merged/pimerge.json": ("merge -q", "inspect merged", "report --force"),
    "comparison.json": ("report --force",),
    "weights.json": (f"{TWO} --coefficients weights.json",),
    "config.json": (f"{FILES} --config config.json",),
    "base/config.json": ("merge --into base -o full --dry-run", f"{TWO} --base base"),
    "sharded/model.safetensors.index.json": ("merge --into sharded -o full --dry-run",),
}
fuzzed = settings(
    max_examples=BUDGET,
    deadline=None,
    derandomize=not ALL,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a smaller example would take minutes to be found
)


@pytest.fixture(scope="module")
def folder(workshop: Workshop) -> Path:
    """A folder with one of every document."""
    workshop.lay_out((EMBED, RANK, "merge -q", COMPARE))
    folder = Path(shutil.copytree(workshop.folder, workshop.root / "documents"))
    (folder / "weights.json").write_text(json.dumps({"a": 0.5, "b": {"*": 0.2, "*.layer.1.*": 0.7}}))
    shutil.copyfile(folder / "experts" / "a" / "adapter_config.json", folder / "config.json")
    sharded = Path(shutil.copytree(folder / "base", folder / "sharded"))
    shard = (sharded / "model.safetensors").rename(sharded / "model-00001-of-00001.safetensors")
    with safe_open(shard, "pt") as tensors:
        index = {
            "metadata": {"total_size": shard.stat().st_size},
            "weight_map": dict.fromkeys(tensors.keys(), shard.name),
        }
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", READERS)
@fuzzed
@given(data=st.data())
def test_commands_use_or_refuse_a_changed_document(name: str, folder: Path, data: st.DataObject) -> None:
    path = folder / name
    content = path.read_bytes()
    is_json = path.suffix == ".json"
    changed = data.draw(json_files(json.loads(content)) if is_json else changed_bytes(content))
    try:
        for command in READERS[name]:
            path.write_bytes(changed)
            with within(SECONDS):
                code, _, err = answer(str(folder), ["-m", "pimerge", *command.split()])
            assert code in (0, 3), (command, code, err)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@fuzzed
@given(data=st.data())
def test_a_base_with_a_changed_document_is_loaded_or_refused(name: str, folder: Path, data: st.DataObject) -> None:
    path = folder / "base" / name
    content = path.read_bytes()
    path.write_bytes(data.draw(json_files(json.loads(content))))
    try:
        with within(SECONDS):
            load_base(find_base("base", None, folder), open_task(folder / "task"), torch.device("cpu"), torch.float32)
    except PimergeError:
        pass
    finally:
        path.write_bytes(content)


@fuzzed
@given(data=st.data())
def test_a_changed_task_is_read_or_refused(folder: Path, data: st.DataObject) -> None:
    path = folder / "task" / "task.json"
    content = path.read_bytes()
    path.write_bytes(data.draw(json_files(json.loads(content))))
    try:
        with within(SECONDS):
            open_task(folder / "task").rows("train")
    except PimergeError:
        pass
    finally:
        path.write_bytes(content)
