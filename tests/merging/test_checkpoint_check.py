"""Checkpoints that transformers could not load are found before they are put in place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pimerge
from pimerge.checkpoints.checkpoint import open_checkpoint
from pimerge.core.errors import PimergeError
from pimerge.merging import checkpoint_check, into_checkpoint
from pimerge.merging.checkpoint_check import check_checkpoint, check_trained
from tests.support.checkpoints import set_checkpoint_config, shaken
from tests.support.experts import MakeExpert

Edit = Callable[[dict[str, Tensor]], object]
EMBEDDING = "model.embed_tokens.weight"
FAULTS: dict[str, tuple[Edit, str]] = {
    "lost": (lambda it: it.pop("model.norm.weight"), "'model.norm.weight' is missing in the result"),
    "stray": (lambda it: it.update(x=torch.ones(1)), r"'x' is \(1,\) in the result, expected missing"),
    "shape": (lambda it: it.update({EMBEDDING: torch.ones(9, 16)}), rf"'{EMBEDDING}' is \(9, 16\) in the result"),
}


def copied(base: Path, folder: Path, edit: Edit = dict) -> Path:
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, language_base: Callable[[str], Path], tmp_path: Path) -> None:
    base = language_base("llama-lm")
    edit, message = FAULTS[fault]
    check_checkpoint(copied(base, tmp_path / "right"), open_checkpoint(base), {})
    with pytest.raises(PimergeError, match=f"would not load\n- {message}"):
        check_checkpoint(copied(base, tmp_path / "wrong", edit), open_checkpoint(base), {})


def test_the_config_must_state_the_vocabulary(language_base: Callable[[str], Path], tmp_path: Path) -> None:
    base, names = language_base("llama-lm"), (EMBEDDING, "lm_head.weight")
    folder = copied(base, tmp_path / "resized", lambda it: it.update({name: torch.ones(900, 16) for name in names}))
    with pytest.raises(PimergeError, match=r"has 900 rows, but config\.json states"):
        check_checkpoint(folder, open_checkpoint(base), dict.fromkeys(names, (900, 16)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 900}))
    check_checkpoint(folder, open_checkpoint(base), dict.fromkeys(names, (900, 16)))


def test_a_wrong_checkpoint_is_not_put_in_place(
    make_expert: MakeExpert, language_base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = language_base("llama-lm")
    make_expert(tmp_path / "expert", base)
    pimerge.merge(tmp_path / "expert", into=base, output=tmp_path / "full")
    check = checkpoint_check.check_checkpoint
    monkeypatch.setattr(
        into_checkpoint, "check_checkpoint", lambda path, source, changed: check(path, source, {"x": (1,)})
    )
    with pytest.raises(PimergeError, match="the checkpoint was not written, since it would not load") as caught:
        pimerge.merge(tmp_path / "expert", into=base, output=tmp_path / "other")
    assert "please report it" in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_a_trained_model_is_read_again(language_base: Callable[[str], Path], tmp_path: Path) -> None:
    base = language_base("llama-lm")
    check_trained(base)
    diverged = shaken(base, tmp_path / "nan", 0, lambda found: found.update({EMBEDDING: found[EMBEDDING] * torch.nan}))
    with pytest.raises(PimergeError, match=r"1 of \d+ trained tensors hold NaN or Inf[\s\S]*lower learning rate"):
        check_trained(diverged)
    resized = shaken(base, tmp_path / "resized", 0)
    set_checkpoint_config(resized, vocab_size=7)
    with pytest.raises(PimergeError, match=r"but the model of config\.json has \(7, "):
        check_trained(resized)
