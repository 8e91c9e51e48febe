"""The experts of a pool, wherever they are in it, and folders of programs that pimerge does not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pimerge.adapters.expert import open_expert
from pimerge.adapters.pool import find_experts
from pimerge.core.errors import PimergeError
from tests.support.adapter_files import written
from tests.support.experts import raw_expert, updates_of

SHAPES = {"q": (3, 2, 4)}


def test_a_run_stands_for_its_own_adapter_or_its_checkpoints(tmp_path: Path) -> None:
    own = raw_expert(tmp_path / "own", updates_of(SHAPES))
    raw_expert(own / "checkpoint-5", updates_of(SHAPES))
    steps = [raw_expert(tmp_path / "run" / f"checkpoint-{step}", updates_of(SHAPES)) for step in (500, 1000)]
    (tmp_path / "run" / "logs").mkdir()
    assert find_experts(tmp_path) == [own, *steps]
    assert find_experts(tmp_path / "run") == sorted(steps)
    with pytest.raises(PimergeError, match="name the experts in it"):
        open_expert(tmp_path / "run")


def test_experts_are_found_two_and_three_levels_down(tmp_path: Path) -> None:
    deep = [raw_expert(tmp_path / "org" / name / "checkpoint-100", updates_of(SHAPES)) for name in ("a", "b")]
    assert find_experts(tmp_path) == deep
    assert find_experts(tmp_path / "org") == deep
    with pytest.raises(PimergeError, match=f"name the experts in it: {deep[0]}, {deep[1]}"):
        open_expert(tmp_path)


def test_files_and_folders_of_one_file_are_experts(tmp_path: Path) -> None:
    file = written(tmp_path / "a.safetensors", "kohya", 1)
    written(tmp_path / "diffusion" / "pytorch_lora_weights.safetensors", "diffusers", 1)
    mlx = written(tmp_path / "mlx.safetensors", "mlx", 1)
    assert find_experts(tmp_path) == [file, tmp_path / "diffusion", mlx]
    assert [open_expert(path).name for path in find_experts(tmp_path)] == ["a", "diffusion", "mlx"]
    assert open_expert(tmp_path / "diffusion" / "pytorch_lora_weights.safetensors").name == "diffusion"
    written(tmp_path / "diffusion" / "other.safetensors", "diffusers", 1)
    with pytest.raises(PimergeError, match="holds 2 adapters, each in a file"):
        open_expert(tmp_path / "diffusion")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"adapter_config.json": {"config": {}, "model_class": "BertModel"}, "pytorch_adapter.bin": {}}, "AdapterHub"),
        ({"adapter_config.json": {"base_model": "lerobot/smolvla_base"}}, "LeRobot"),
        ({"lora.gguf": {}}, "GGUF"),
        ({"adapter_config.json": {"fine_tune_type": "full"}, "adapters.safetensors": {}}, "mlx-lm"),
        ({"adapter_config.json": {"r": 4}, "adapter_model.safetensors": {}}, "adapter_config.json has no peft_type"),
    ],
)
def test_other_writers_are_named(files: dict[str, Any], said: str, tmp_path: Path) -> None:
    weights = raw_expert(tmp_path / "plain", updates_of(SHAPES)) / "adapter_model.safetensors"
    folder = tmp_path / "other"
    folder.mkdir()
    for name, content in files.items():
        if name.endswith(".safetensors"):
            (folder / name).write_bytes(weights.read_bytes())
        else:
            (folder / name).write_text(json.dumps(content))
    with pytest.raises(PimergeError, match=said) as caught:
        open_expert(folder)
    assert "'None'" not in str(caught.value)
