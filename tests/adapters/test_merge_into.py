"""Merging an adapter into a full checkpoint, against PEFT's model of the two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.into_config import label_fields
from pimerge.adapters.merge_into import MergedInto, merge_into, plan_merge_into
from pimerge.checkpoints.checkpoint import open_checkpoint
from pimerge.core.errors import PimergeError
from tests.support.bases import model_for
from tests.support.checkpoints import contents, logits, tensors
from tests.support.experts import MakeExpert, raw_expert
from tests.support.numerics import normal


def merged_into(base: Path, expert: Expert, output: Path, **options: Any) -> MergedInto:
    """Merge one expert into a checkpoint."""
    head, fields = options.pop("head", expert.head_tensors()), options.pop("fields", None)
    checkpoint = open_checkpoint(base)
    plan = plan_merge_into(
        checkpoint,
        expert.modules,
        fan_in_fan_out=bool(expert.config.get("fan_in_fan_out")),
        head=head,
        fields=fields,
    )
    if not checkpoint.is_file:
        output.mkdir()
    return merge_into(plan, expert.factors, output, head=head, **options)


def transformers_class(base: Path) -> Any:
    """The class of a base with a head."""
    return type(model_for(base))


ALL = {
    "vit": ["q_proj", "v_proj", "fc1", "projection"],
    "bert": ["query", "output.dense", "word_embeddings"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "wte"],
}


@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2"])
def test_folded_checkpoint_answers_as_the_adapter(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, make_expert: MakeExpert
) -> None:
    base = request.getfixturevalue(f"{kind}_base")
    expert = open_expert(make_expert(tmp_path / "expert", base, target_modules=ALL[kind], use_rslora=True))
    done = merged_into(base, expert, tmp_path / "out", fields=label_fields(["x", "y"]))
    loaded: Any = transformers_class(base).from_pretrained(tmp_path / "out")
    loaded.config.pad_token_id = 0
    wanted = logits(PeftModel.from_pretrained(model_for(base), expert.path), kind)
    assert (logits(loaded, kind) - wanted).abs().max() < 1e-5
    assert (wanted - logits(model_for(base), kind)).abs().max() > 1e-3
    assert (done.modules, done.untied) == (len(expert.modules), False)
    before, after = tensors(base), tensors(tmp_path / "out")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) == len(expert.modules)
    assert loaded.config.id2label == {0: "x", 1: "y"}


def test_bias_update_is_added(bert_base: Path, tmp_path: Path, make_expert: MakeExpert) -> None:
    expert = open_expert(make_expert(tmp_path / "expert", bert_base, lora_bias=True))
    merged_into(bert_base, expert, tmp_path / "out")
    loaded: Any = transformers_class(bert_base).from_pretrained(tmp_path / "out")
    wanted = logits(PeftModel.from_pretrained(model_for(bert_base), expert.path), "bert")
    assert (logits(loaded, "bert") - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("headless", [True, False])
def test_the_backbones_prefix_may_be_on_either_side(
    headless: bool, bert_base: Path, tmp_path: Path, make_expert: MakeExpert
) -> None:
    """An adapter of BertForSequenceClassification on a BertModel, and one of a BertModel on the other."""
    full = tmp_path / "full"
    full_model: Any = model_for(bert_base)
    full_model.save_pretrained(full)
    if headless:
        expert = make_expert(tmp_path / "expert", bert_base)
        base = bert_base
    else:
        model = get_peft_model(transformers.BertModel.from_pretrained(bert_base), LoraConfig(target_modules=["query"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / "expert")
        expert, base = tmp_path / "expert", full
    opened = open_expert(expert)
    merged_into(base, opened, tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    module, factors = "encoder.layer.1.attention.self.query", None
    for name in opened.modules:
        if name.endswith(module):
            factors = opened.factors(name)
    assert factors is not None
    key = next(key for key in before if key.endswith(module + ".weight"))
    wanted = before[key] + factors.scaling * (factors.B @ factors.A)
    assert torch.allclose(after[key], wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["encoder.layer.1.attention.attention.query", "vit.layers.1.attention.q_proj"])
def test_modules_by_the_names_of_older_and_newer_transformers(name: str, vit_base: Path, tmp_path: Path) -> None:
    update = (normal(2, 16), normal(16, 2))
    expert = open_expert(raw_expert(tmp_path / "e", {name: update}))
    merged_into(vit_base, expert, tmp_path / "out")
    key = "layers.1.attention.q_proj.weight"
    before, after = (transformers.ViTModel.from_pretrained(path).state_dict() for path in (vit_base, tmp_path / "out"))
    assert torch.allclose(after[key], before[key] + update[1] @ update[0], atol=1e-6)


def test_sharded_and_generation_config(gpt2_base: Path, tmp_path: Path, make_expert: MakeExpert) -> None:
    base = tmp_path / "gpt2"
    transformers.GPT2Model.from_pretrained(gpt2_base).save_pretrained(base, max_shard_size="8KB")
    (base / "generation_config.json").write_text('{ "max_length":7}')
    expert = open_expert(make_expert(tmp_path / "expert", gpt2_base, head=False))
    merged_into(base, expert, tmp_path / "out")
    before, after = contents(base), contents(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[name] == after[name] for name in before if not name.endswith(".safetensors"))
    assert list(open_checkpoint(base).home) == list(open_checkpoint(tmp_path / "out").home)
    transformers.GPT2Model.from_pretrained(tmp_path / "out")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 whose head is its embedding."""
    folder = tmp_path_factory.mktemp("bases") / "qwen"
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("targets", "untied"),
    [
        (["q_proj", "up_proj"], False),
        (["lm_head"], True),
        (["embed_tokens", "q_proj"], True),
        (["lm_head", "embed_tokens"], True),
    ],
)
def test_tied_weights_are_untied_only_if_one_changes(
    tied: Path, targets: list[str], untied: bool, tmp_path: Path
) -> None:
    def fresh() -> Any:
        return transformers.Qwen2ForCausalLM.from_pretrained(tied)

    model = get_peft_model(fresh(), LoraConfig(r=2, target_modules=targets))
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(normal(*parameter.shape, seed=index, scale=0.3))
    wanted = logits(model, "gpt2")
    model.save_pretrained(tmp_path / "expert", save_embedding_layers=False)
    done = merged_into(tied, open_expert(tmp_path / "expert"), tmp_path / "out")
    loaded = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(loaded, "gpt2") - wanted).abs().max() < 1e-5
    assert done.untied is untied
    assert ("lm_head.weight" in tensors(tmp_path / "out")) is untied
    same = (tied / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()
    assert same is not untied


def test_an_untied_weight_is_in_the_index_of_the_shards(tied: Path, tmp_path: Path) -> None:
    model = transformers.Qwen2ForCausalLM.from_pretrained(tied)
    model.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    wanted = logits(adapted, "gpt2")
    adapted.save_pretrained(tmp_path / "expert", save_embedding_layers=False)
    merged_into(tmp_path / "base", open_expert(tmp_path / "expert"), tmp_path / "out")
    before, after = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("base", "out")
    )
    assert list(after["weight_map"]) == [*before["weight_map"], "lm_head.weight"]
    assert after["metadata"]["total_parameters"] == before["metadata"]["total_parameters"] + 24 * 16
    loaded = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(loaded, "gpt2") - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    (A, B), W = (normal(2, 6, seed=1), normal(8, 2, seed=2)), normal(8, 6).to(dtype)
    save_file({"unet.a.weight": W}, tmp_path / "x.safetensors")
    expert = open_expert(raw_expert(tmp_path / "e", {"a": (A, B)}))
    merged_into(tmp_path / "x.safetensors", expert, tmp_path / "y.safetensors")
    found = load_file(tmp_path / "y.safetensors")["unet.a.weight"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(found, torch.addmm(W.to(wide), B.to(wide), A.to(wide)).to(dtype))


def test_diffusion_file_by_other_separators_and_conv(tmp_path: Path) -> None:
    prefix = "model.diffusion_model."
    weights = {f"{prefix}down.0.to_q.weight": normal(4, 6), f"{prefix}down.0.conv.weight": normal(4, 2, 3, 3)}
    save_file({**weights, "vae.x.weight": normal(2, 2)}, tmp_path / "x.safetensors")
    updates = {"down_0_to_q": (normal(2, 6), normal(4, 2)), "unet.down.0.conv": (normal(2, 18), normal(4, 2))}
    expert = open_expert(raw_expert(tmp_path / "e", updates))
    merged_into(tmp_path / "x.safetensors", expert, tmp_path / "y.safetensors")
    after = load_file(tmp_path / "y.safetensors")
    for (key, W), (A, B) in zip(weights.items(), updates.values(), strict=True):
        assert torch.allclose(after[key], W + (B @ A).view(W.shape), atol=1e-6)


@pytest.mark.parametrize("turned", [True, False])
def test_square_weights_follow_fan_in_fan_out(tmp_path: Path, turned: bool) -> None:
    A, B, W = normal(2, 5, seed=1), normal(5, 2, seed=2), normal(5, 5)
    save_file({"a.weight": W}, tmp_path / "x.safetensors")
    expert = open_expert(raw_expert(tmp_path / "e", {"a": (A, B)}, fan_in_fan_out=turned))
    merged_into(tmp_path / "x.safetensors", expert, tmp_path / "y.safetensors")
    delta = (B @ A).T if turned else B @ A
    assert torch.allclose(load_file(tmp_path / "y.safetensors")["a.weight"], W + delta, atol=1e-6)


def test_every_misfit_is_reported_at_once(tmp_path: Path) -> None:
    save_file({"layer.a.weight": normal(4, 4), "layer.b.weight": normal(4, 4)}, tmp_path / "x.safetensors")
    updates = {name: (normal(2, 6), normal(4, 2)) for name in ("layer.a", "layer.c", "other", "layer.b")}
    misfits = {name: updates[name] for name in ("layer.a", "layer.c", "other")}
    expert = open_expert(raw_expert(tmp_path / "e", misfits))
    with pytest.raises(PimergeError) as error:
        plan_merge_into(open_checkpoint(tmp_path / "x.safetensors"), expert.modules)
    for part in ("no weight for module 'layer.c'", "no weight for module 'other'", "did you mean 'layer."):
        assert part in str(error.value)
    expert = open_expert(raw_expert(tmp_path / "f", {name: updates[name] for name in ("layer.b", "layer.a")}))
    with pytest.raises(PimergeError, match=r"'layer\.a'.*\(4, 6\)[\s\S]*'layer\.b'.*\(4, 6\)"):
        plan_merge_into(open_checkpoint(tmp_path / "x.safetensors"), expert.modules)


def test_ambiguous_and_double_matches_are_refused(tmp_path: Path) -> None:
    save_file({"unet.a.b.weight": normal(4, 4), "unet.a_b.weight": normal(4, 4)}, tmp_path / "x.safetensors")
    expert = open_expert(raw_expert(tmp_path / "e", {"a.b": (normal(2, 4), normal(4, 2))}))
    with pytest.raises(PimergeError, match="several tensors"):
        plan_merge_into(open_checkpoint(tmp_path / "x.safetensors"), expert.modules)
    updates = {name: (normal(2, 4), normal(4, 2)) for name in ("unet.a.b", "unet.a_b")}
    expert = open_expert(raw_expert(tmp_path / "f", updates))
    assert len(plan_merge_into(open_checkpoint(tmp_path / "x.safetensors"), expert.modules).weights) == 2


def test_bias_update_without_a_bias_and_quantised_are_refused(
    tied: Path, tmp_path: Path, edit: Callable[..., Path]
) -> None:
    update = (normal(2, 16), normal(16, 2))
    extra = {"base_model.model.model.layers.0.self_attn.o_proj.lora_B.bias": normal(16)}
    expert = open_expert(raw_expert(tmp_path / "e", {"model.layers.0.self_attn.o_proj": update}, extra, lora_bias=True))
    with pytest.raises(PimergeError, match="its layer in the checkpoint has no bias"):
        plan_merge_into(open_checkpoint(tied), expert.modules)
    quantised = edit(tied, tmp_path / "q", quantization_config={"quant_method": "awq"})
    with pytest.raises(PimergeError, match="is quantised"):
        plan_merge_into(open_checkpoint(quantised), expert.modules)


@pytest.fixture
def edit() -> Callable[..., Path]:
    """Copy a base with other config fields."""
    import shutil

    def change(base: Path, folder: Path, **fields: Any) -> Path:
        shutil.copytree(base, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        return folder

    return change


def test_fused_weights_are_refused_by_name(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    plan_merge_into(
        open_checkpoint(tmp_path / "moe"),
        open_expert(
            raw_expert(tmp_path / "e", {"model.layers.0.self_attn.q_proj": (normal(2, 16), normal(16, 2))})
        ).modules,
    )
    expert = open_expert(
        raw_expert(tmp_path / "f", {"model.layers.0.mlp.experts.gate_up_proj": (normal(2, 16), normal(16, 2))})
    )
    with pytest.raises(PimergeError, match="gate_up_proj"):
        plan_merge_into(open_checkpoint(tmp_path / "moe"), expert.modules)
