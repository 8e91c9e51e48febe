"""Experts without ΔW that adapt different modules: one that does not adapt a module leaves it as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, PeftConfig, PeftModel

from pimerge.core.errors import PimergeError
from pimerge.merging.merge import merge
from pimerge.merging.verification.verify import verify
from tests.support.into_cases import adapted, llama, opened, outputs

CASES: dict[str, tuple[PeftConfig, PeftConfig]] = {
    "ia3": (
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    ),
    "ln-tuning": (
        LNTuningConfig(target_modules=["input_layernorm"]),
        LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    ),
}


@pytest.mark.parametrize("weights", [[0.6, 0.4], [0.7, 0.5]])
@pytest.mark.parametrize("kind", CASES)
def test_the_adapter_and_the_checkpoint_are_the_weighted_sum(kind: str, weights: list[float], tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    experts = [tmp_path / "a", tmp_path / "b"]
    for seed, (folder, config) in enumerate(zip(experts, CASES[kind], strict=True)):
        adapted(base, config, folder, tmp_path / "base", seed=seed)
    wanted = copy.deepcopy(base)
    start = {name: value.double() for name, value in base.state_dict().items()}
    total = {name: value.clone() for name, value in start.items()}
    for folder, weight in zip(experts, weights, strict=True):
        model: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).merge_and_unload()
        for name, value in model.state_dict().items():
            total[name] += weight * (value.double() - start[name])
    wanted.load_state_dict(total)
    options = {"method": "interpolated", "weights": weights, "head": "none", "ranking": tmp_path / "none.json"}
    merge(experts, output=tmp_path / "adapter", **options)
    found = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(outputs(found), outputs(wanted), rtol=1e-4, atol=1e-5)
    merge(experts, into=tmp_path / "base", output=tmp_path / "out", **options)
    torch.testing.assert_close(outputs(opened(tmp_path / "out", base)), outputs(wanted), rtol=1e-4, atol=1e-5)
    assert verify(tmp_path / "adapter", experts=experts, weights=weights, base=tmp_path / "base").equal


def test_experts_that_share_no_module_are_refused(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    for name in ("input_layernorm", "post_attention_layernorm"):
        adapted(base, LNTuningConfig(target_modules=[name]), tmp_path / name, tmp_path / "base")
    with pytest.raises(PimergeError, match="adapts other modules"):
        merge([tmp_path / "input_layernorm", tmp_path / "post_attention_layernorm"], output=tmp_path / "out")
