"""The folder that every disturbed command starts with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.checkpoints import shaken
from tests.support.experts import MakeExpert
from tests.support.fault_jobs import Workshop
from tests.support.forks import warm


@pytest.fixture(scope="session")
def workshop(
    tmp_path_factory: pytest.TempPathFactory, bert_base: Path, text_task: Path, make_expert: MakeExpert
) -> Workshop:
    """Three experts of one task, a full fine-tune, two state dicts, and an adapter in a pickle."""
    warm()
    root = tmp_path_factory.mktemp("faults")
    start = root / "start"
    base, task = Path(shutil.copytree(bert_base, start / "base")), start / "task"
    shutil.copytree(text_task, task)
    for seed, name in enumerate(("X", "a", "b")):
        folder = make_expert(start / "experts" / name, bert_base, task, seed=seed, r=2)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(bert_base)}))
    tensors = load_file(start / "experts" / "a" / "adapter_model.safetensors")
    pickled = start / "pickled"
    shutil.copytree(start / "experts" / "a", pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(tensors, pickled / "adapter_model.bin")
    shaken(base, start / "other", 0)
    for seed, name in enumerate("ab"):
        other = shaken(base, root / name, seed)
        shutil.copyfile(other / "model.safetensors", start / f"{name}.safetensors")
    return Workshop(root, start)
