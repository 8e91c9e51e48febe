"""LoRA of ``torch.nn.MultiheadAttention``, whose input projections are one parameter, against PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import Tensor

from pimerge.merging.merge import merge
from tests.support.into_cases import adapted, filled, merged_into, opened

PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def pooled(model: Any) -> Tensor:
    """The output of the attention that pools an image."""
    with torch.no_grad():
        result: Tensor = model(pixel_values=PIXELS).pooler_output
    return result


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[Any]]:
    """A base with such an attention, and two adapters of different rank."""
    folder = tmp_path_factory.mktemp("siglip")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipVisionConfig(**sizes, image_size=8, patch_size=4)
    base = filled(transformers.SiglipVisionModel(config))
    base.save_pretrained(folder / "base")
    models = [
        adapted(
            base, LoraConfig(r=rank, target_modules=["attention", "q_proj"]), folder / name, folder / "base", seed=rank
        )
        for rank, name in ((4, "a"), (2, "b"))
    ]
    return folder, base, models


def test_one_adapter_is_merged_as_peft_does(siglip: tuple[Path, Any, list[Any]], tmp_path: Path) -> None:
    folder, base, models = siglip
    wanted = pooled(models[0])
    assert (wanted - pooled(base)).abs().max() > 1e-3
    merged_into(folder / "a", folder / "base", tmp_path / "full")
    torch.testing.assert_close(pooled(opened(tmp_path / "full", base)), wanted, rtol=1e-5, atol=1e-5)
    merge(folder / "a", output=tmp_path / "one", ranking=tmp_path / "none.json")
    torch.testing.assert_close(pooled(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one")), wanted)


@pytest.mark.parametrize("rank", ["max", "auto", 3])
def test_two_adapters_have_one_rank_in_both_projections(
    rank: int | str, siglip: tuple[Path, Any, list[Any]], tmp_path: Path
) -> None:
    folder, base, models = siglip
    two = [folder / "a", folder / "b"]
    options: Any = {"rank": rank, "method": "interpolated", "weights": [0.7, 0.4]}
    merge(two, output=tmp_path / "m", ranking=tmp_path / "none.json", **options)
    found = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "m").eval()
    merged_into(two, folder / "base", tmp_path / "full", **options)
    torch.testing.assert_close(pooled(opened(tmp_path / "full", base)), pooled(found), rtol=1e-4, atol=1e-5)
    if rank == "max":
        wanted = copy.deepcopy(base)
        changed = [dict(copy.deepcopy(model).merge_and_unload().named_parameters()) for model in models]
        with torch.no_grad():
            for name, weight in wanted.named_parameters():
                start = weight.clone()
                for share, other in zip((0.7, 0.4), changed, strict=True):
                    weight += share * (other[name] - start)
        torch.testing.assert_close(pooled(found), pooled(wanted), rtol=1e-4, atol=1e-5)
