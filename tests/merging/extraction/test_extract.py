"""``pimerge.extract``, against dense decompositions and against PEFT's model of base and adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pimerge
from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from tests.support.bases import model_for
from tests.support.checkpoints import contents, set_checkpoint_config, shaken, tensors
from tests.support.experts import MakeExpert, dense_deltas
from tests.support.numerics import logits_of, normal

TEXT = {"input_ids": torch.arange(4, 14).view(2, 5)}


def moved(folder: Path, base: Path, kinds: tuple[type, ...], rank: int | None = None, scale: float = 0.05) -> nn.Module:
    """A fine-tune of the base that moves the weights of some layers only, by updates of a rank or of full rank."""
    model = model_for(base)
    with torch.no_grad():
        for index, module in enumerate(m for m in model.modules() if isinstance(m, kinds)):
            rows, columns = module.weight.shape
            if rank is None:
                module.weight += normal(rows, columns, seed=index, scale=scale)
            else:
                left, right = normal(rows, rank, seed=index, scale=scale), normal(rank, columns, seed=index + 500)
                module.weight += left @ right
    model.save_pretrained(folder)
    return model.eval()


def loaded(base: Path, adapter: Path) -> nn.Module:
    """PEFT's model of base and adapter."""
    return PeftModel.from_pretrained(model_for(base), adapter).eval()


def batch_for(base: Path) -> dict[str, Tensor]:
    if base.name in ("vit", "clip"):
        return {"pixel_values": normal(2, 3, 16, 16)}
    return {**TEXT, "decoder_input_ids": TEXT["input_ids"]} if base.name in ("t5", "bart") else TEXT


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm", "qwen2-lm", "t5", "bart"])
def test_the_adapter_answers_as_the_fine_tune(name: str, language_base: Callable[[str], Path], tmp_path: Path) -> None:
    base = language_base(name)
    kinds = (nn.Linear, nn.Embedding, transformers.pytorch_utils.Conv1D)
    tuned = moved(tmp_path / "tuned", base, kinds if name != "bart" else kinds[::2])
    found = pimerge.extract(tmp_path / "tuned", base=base, rank="max", output=tmp_path / "lora")
    assert found.left_out == []
    assert found.error < 1e-5
    batch = batch_for(base)
    torch.testing.assert_close(
        logits_of(loaded(base, tmp_path / "lora"), batch), logits_of(tuned, batch), rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_error_is_that_of_the_best_approximation(
    rank: int, language_base: Callable[[str], Path], tmp_path: Path
) -> None:
    base = language_base("llama-lm")
    moved(tmp_path / "tuned", base, (nn.Linear,))
    found = pimerge.extract(tmp_path / "tuned", base=base, rank=rank, output=tmp_path / "lora")
    before, after = tensors(base), tensors(tmp_path / "tuned")
    deltas = dense_deltas(open_expert(tmp_path / "lora"))
    assert {s.name for s in found.modules} == set(deltas)
    for summary in found.modules:
        key = f"{summary.name}.weight"
        delta = after[key].double() - before[key].double()
        singular = np.linalg.svd(delta.numpy(), compute_uv=False)
        best = np.sqrt((singular[rank:] ** 2).sum() / (singular**2).sum())
        assert summary.error == pytest.approx(best, abs=1e-6)
        assert float((deltas[summary.name] - delta).norm() / delta.norm()) == pytest.approx(summary.error, abs=1e-7)
        assert summary.rank == min(rank, *delta.shape)
    checked = pimerge.verify(tmp_path / "lora", experts=tmp_path / "tuned", base=base)
    assert checked.verdict == "truncated"
    assert {each.rank for each in checked.modules if each.verdict == "truncated"} == {rank}


def test_the_rank_of_a_merged_lora_is_found_again(language_base: Callable[[str], Path], tmp_path: Path) -> None:
    base = language_base("llama-lm")
    moved(tmp_path / "tuned", base, (nn.Linear,), rank=3)
    found = pimerge.extract(tmp_path / "tuned", base=base, rank="max", output=tmp_path / "lora")
    assert {s.rank for s in found.modules} == {3}
    assert found.error < 1e-5
    least = pimerge.extract(tmp_path / "tuned", base=base, rank="auto", energy=0.8, output=tmp_path / "least")
    assert {s.rank for s in least.modules} <= {1, 2, 3}
    assert all(s.error**2 <= 0.2 for s in least.modules)


def test_a_classifier_keeps_its_head(bert_base: Path, tmp_path: Path) -> None:
    tuned = moved(tmp_path / "tuned", bert_base, (nn.Linear,))
    assert tuned.config.architectures == ["BertForSequenceClassification"]
    found = pimerge.extract(tmp_path / "tuned", base=bert_base, rank="max", output=tmp_path / "lora")
    assert found.head == ["classifier.bias", "classifier.weight"]
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    model = loaded(bert_base, tmp_path / "lora")
    torch.testing.assert_close(logits_of(model, TEXT), logits_of(tuned, TEXT), rtol=0, atol=1e-4)


def test_an_image_classifier_has_its_class_in_the_config(vit_base: Path, tmp_path: Path) -> None:
    tuned = moved(tmp_path / "tuned", vit_base, (nn.Linear,))
    pimerge.extract(tmp_path / "tuned", base=vit_base, rank="max", output=tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == "ViTForImageClassification"
    batch = {"pixel_values": normal(2, 3, 16, 16)}
    model = loaded(vit_base, tmp_path / "lora")
    torch.testing.assert_close(logits_of(model, batch), logits_of(tuned, batch), rtol=0, atol=1e-4)


def test_what_a_lora_cannot_hold_is_named(bert_base: Path, tmp_path: Path) -> None:
    def edit(found: dict[str, Tensor]) -> None:
        found["embeddings.word_embeddings.weight"] = torch.cat(
            [found["embeddings.word_embeddings.weight"], torch.ones(1, 16)]
        )

    tuned = shaken(bert_base, tmp_path / "tuned", 1, edit)
    set_checkpoint_config(
        tuned, vocab_size=len(load_file(tuned / "model.safetensors")["embeddings.word_embeddings.weight"])
    )
    found = pimerge.extract(tuned, base=bert_base, output=tmp_path / "lora", include=["*.query"])
    reasons = {each.name: each.why for each in found.left_out}
    rows = tensors(bert_base)["embeddings.word_embeddings.weight"].shape
    assert (
        reasons["embeddings.word_embeddings.weight"] == f"its shape is {(rows[0] + 1, 16)}, in the base {tuple(rows)}"
    )
    assert reasons["encoder.layer.0.output.dense.bias"] == "a bias"
    assert reasons["embeddings.LayerNorm.weight"] == "a norm or another vector"
    assert reasons["encoder.layer.0.attention.self.key"] == "not selected"
    sizes = {each.name: each.size for each in found.left_out}
    before, after = tensors(bert_base), tensors(tuned)
    key = "embeddings.LayerNorm.weight"
    assert sizes[key] == pytest.approx(float((after[key] - before[key]).norm() / before[key].norm()), rel=1e-5)
    assert found.error_of_all > found.error
    assert "Left out" in (tmp_path / "lora" / "README.md").read_text()


@pytest.mark.parametrize("sharded", [False, True])
def test_bfloat16_and_shards(sharded: bool, language_base: Callable[[str], Path], tmp_path: Path) -> None:
    base = language_base("llama-lm")
    model = moved(tmp_path / "float", base, (nn.Linear,), scale=0.5).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="8KB" if sharded else "1GB")
    found = pimerge.extract(tmp_path / "tuned", base=base, rank="max", output=tmp_path / "lora")
    assert found.error < 1e-2
    checked = pimerge.verify(tmp_path / "lora", experts=tmp_path / "tuned", base=base)
    assert {str(each.verdict) for each in checked.modules} <= {"equal", "truncated"}
    again = pimerge.extract(tmp_path / "tuned", base=base, rank=4, dtype="bfloat16", output=tmp_path / "narrow")
    deltas, exact = dense_deltas(open_expert(tmp_path / "narrow")), tensors(tmp_path / "tuned")
    before = tensors(base)
    for summary in again.modules:
        key = f"{summary.name}.weight"
        delta = exact[key].double() - before[key].double()
        assert summary.error == pytest.approx(float((deltas[summary.name] - delta).norm() / delta.norm()), rel=1e-9)


def test_the_same_seed_gives_the_same_bytes_and_joins_a_pool(
    language_base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pimerge.merging.extraction import decompose

    monkeypatch.setattr(decompose, "_DENSE", 4)  # so that the small matrices are decomposed at random
    base = language_base("llama-lm")
    moved(tmp_path / "tuned", base, (nn.Linear,))
    for folder in ("one", "two"):
        pimerge.extract(tmp_path / "tuned", base=base, rank=2, output=tmp_path / folder)
    one, two = (contents(tmp_path / folder) for folder in ("one", "two"))
    assert one == two
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "pimerge.json"} == set(one)
    merged = pimerge.merge([tmp_path / "one", tmp_path / "two"], output=tmp_path / "merged")
    assert pimerge.verify(merged.path, experts=[tmp_path / "one", tmp_path / "two"]).equal


def test_wrong_inputs_are_refused(bert_base: Path, vit_base: Path, tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match="equals the base"):
        pimerge.extract(bert_base, base=bert_base, output=tmp_path / "lora")
    with pytest.raises(PimergeError, match="of type bert, and the base 'vit' of type vit"):
        pimerge.extract(bert_base, base=vit_base, output=tmp_path / "lora")
    tuned = shaken(bert_base, tmp_path / "tuned", 1)
    with pytest.raises(PimergeError, match="--rank is 'many'"):
        pimerge.extract(tuned, base=bert_base, rank="many", output=tmp_path / "lora")
    with pytest.raises(PimergeError, match="matches none"):
        pimerge.extract(tuned, base=bert_base, include=["*.nothing"], output=tmp_path / "lora")
    with pytest.raises(PimergeError, match="or contains it"):
        pimerge.extract(tuned, base=bert_base, output=tuned, force=True)
    shutil.copytree(bert_base, tmp_path / "nan")
    found = load_file(tmp_path / "nan" / "model.safetensors")
    found["encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
    save_file(found, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    with pytest.raises(PimergeError, match="NaN or Inf"):
        pimerge.extract(tmp_path / "nan", base=bert_base, output=tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_another_base_is_remarked(bert_base: Path, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(bert_base)
    torch.manual_seed(5)
    transformers.BertModel(config).save_pretrained(tmp_path / "other")
    notes: list[str] = []
    pimerge.extract(tmp_path / "other", base=bert_base, output=tmp_path / "lora", note=notes.append)
    assert "is probably not the base that 'other' was fine-tuned from" in notes[0]


def test_single_files_and_convolutions(tmp_path: Path) -> None:
    base = {
        "down.0.conv.weight": normal(6, 4, 3, 3, seed=1),
        "mid.to_q.weight": normal(8, 6, seed=2),
        "bias": normal(3),
    }
    tuned = {
        "down.0.conv.weight": base["down.0.conv.weight"] + normal(6, 4, 3, 3, seed=3, scale=0.1),
        "mid.to_q.weight": base["mid.to_q.weight"] + normal(8, 2, seed=4) @ normal(2, 6, seed=5),
        "bias": base["bias"],
    }
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    given = {"base": tmp_path / "base.safetensors", "output": tmp_path / "lora"}
    found = pimerge.extract(tmp_path / "tuned.safetensors", rank="max", **given)
    assert {s.name: s.rank for s in found.modules} == {"down.0.conv": 6, "mid.to_q": 2}
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    A, B = (stored[f"base_model.model.down.0.conv.lora_{x}.weight"] for x in "AB")
    assert (A.shape, B.shape) == ((6, 4, 3, 3), (6, 6, 1, 1))
    delta = tuned["down.0.conv.weight"] - base["down.0.conv.weight"]
    torch.testing.assert_close((B.flatten(1) @ A.flatten(1)).view_as(delta), delta, rtol=0, atol=1e-5)


def test_an_extracted_lora_is_the_adapters_that_were_merged(
    vit_base: Path, tmp_path: Path, make_expert: MakeExpert
) -> None:
    experts = [make_expert(tmp_path / name, vit_base, seed=seed, head=False) for seed, name in enumerate("ab")]
    merged = pimerge.merge(experts, head="none", into=vit_base, output=tmp_path / "full")
    notes: list[str] = []
    found = pimerge.extract(merged.path, base=vit_base, rank="max", output=tmp_path / "lora", note=notes.append)
    assert {s.rank for s in found.modules} == {8}
    assert notes == []
    checked = pimerge.verify(tmp_path / "lora", experts=experts)  # whose modules have the prefix of a model with a head
    assert checked.equal, checked.summary
