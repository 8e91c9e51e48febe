"""Outputs that PEFT could not load are found before they are put in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pimerge
from pimerge.adapters import writer
from pimerge.adapters.output_check import check_adapter
from pimerge.checkpoints.base import Base
from pimerge.core.errors import PimergeError
from tests.support.experts import raw_expert, set_config, set_tensors, updates_of

SHAPES = {"h.q": (6, 2, 4), "h.v": (6, 2, 4)}


@pytest.fixture
def base(tmp_path: Path) -> Base:
    """The header of a base with the adapted modules and one that ends like them."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = {f"{name}.weight": torch.zeros(6, 4) for name in (*SHAPES, "other.h.q", "h.k")}
    save_file(weights, folder / "model.safetensors")
    return Base(str(folder), None, folder)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """An adapter as pimerge writes it."""
    folder = raw_expert(tmp_path / "written", updates_of(SHAPES))
    return set_config(folder, rank_pattern={}, alpha_pattern={}, target_modules="h.q|h.v")


def test_a_right_adapter_passes(written: Path, base: Base) -> None:
    check_adapter(written, base)
    check_adapter(written, Base("org/base", None, None))


A = "base_model.model.h.q.lora_A.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "rank": (lambda it: set_config(it, r=3), "h.q': the tensors have rank 2, adapter_config.json says 3"),
    "partner": (lambda it: set_tensors(it, {A: None}), "'h.q' has no factor A"),
    "stray key": (lambda it: set_tensors(it, {"base_model.model.x": torch.ones(1)}), "neither LoRA factors nor"),
    "too few": (lambda it: set_config(it, target_modules=["h.q"]), "the config does not select 'h.v'"),
    "too many": (lambda it: set_config(it, target_modules=["h.q", "h.v"]), "selects 'other.h.q' of the base"),
    "excluded": (lambda it: set_config(it, exclude_modules=["q"]), "the config does not select 'h.q'"),
    "saved": (lambda it: set_config(it, modules_to_save=["score"]), "modules_to_save has 'score'"),
    "task type": (lambda it: set_config(it, task_type="SEQ_CLS"), "expects a head for the task type SEQ_CLS"),
    "bias": (lambda it: set_config(it, lora_bias=True), "'h.q' has no bias, but lora_bias is True"),
    "shape": (
        lambda it: set_tensors(it, {A: torch.ones(2, 5)}),
        r"module 'h.q': ΔW is 6 × 5, but the weight of the base '.*' is \(6, 4\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, written: Path, base: Base) -> None:
    make, message = FAULTS[fault]
    make(written)
    with pytest.raises(PimergeError, match=f"would not load\n- .*{message}"):
        check_adapter(written, base)


def test_names_of_another_architecture_are_found(written: Path, bert_base: Path) -> None:
    base = Base(str(bert_base), None, bert_base)
    with pytest.raises(PimergeError, match=r"has none of the adapted modules, such as 'h\.q'"):
        check_adapter(written, base)
    names = {f"bert.encoder.layer.{i}.attention.self.query": (16, 2, 16) for i in range(2)}
    check_adapter(set_config(raw_expert(written.with_name("bert"), updates_of(names)), target_modules=["query"]), base)


def test_a_wrong_output_is_not_put_in_place(
    written: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_config(written, base_model_name_or_path=str(base.folder))
    pimerge.merge(written, output=tmp_path / "merged")
    before = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    fields = writer.rank_fields
    monkeypatch.setattr(writer, "rank_fields", lambda *given: {**fields(*given), "r": 7})
    for output in (tmp_path / "merged", tmp_path / "new"):
        with pytest.raises(PimergeError, match="the result was not written, since it would not load") as caught:
            pimerge.merge(written, output=output, force=True)
        assert "please report it" in str(caught.value)
    assert json.loads((tmp_path / "merged" / "adapter_config.json").read_text()) == before
    assert not (tmp_path / "new").exists()
