"""``pimerge.verify`` on merges that PEFT and naive programs made: right ones pass, wrong ones are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pimerge
from pimerge.core.errors import PimergeError
from tests.support.bases import model_for
from tests.support.checkpoints import shaken, tensors
from tests.support.experts import MakeExpert, edit_tensors, raw_expert, set_config
from tests.support.numerics import normal

WEIGHTS = [0.6, 0.3]
Pair = Callable[..., list[Path]]


@pytest.fixture
def pair_on(make_expert: MakeExpert, tmp_path: Path) -> Pair:
    """Two experts on a base, without heads: ``pair_on(base, seeds=(0, 1), **config)``."""

    def make(base: Path, ranks: Sequence[int] = (4, 4), **config: Any) -> list[Path]:
        return [
            make_expert(tmp_path / name, base, seed=seed, init_seed=seed, head=False, **{"r": rank} | config)
            for seed, (name, rank) in enumerate(zip("ab", ranks, strict=True))
        ]

    return make


def with_experts(base: Path, experts: Sequence[Path], dtype: torch.dtype = torch.float32) -> PeftModel:
    """The base with all experts as PEFT's adapters."""
    first, *others = experts
    model = PeftModel.from_pretrained(model_for(base).to(dtype), first, adapter_name=first.name)
    for expert in others:
        model.load_adapter(expert, adapter_name=expert.name)
    return model


def save_combined(model: PeftModel, experts: Sequence[Path], weights: Sequence[float], how: str, folder: Path) -> Path:
    """What PEFT's ``add_weighted_adapter`` makes of the experts, as an adapter's folder."""
    more = {"svd_rank": 8} if how == "svd" else {}
    names = [expert.name for expert in experts]
    model.add_weighted_adapter(names, list(weights), "mixed", combination_type=how, **more)
    model.save_pretrained(folder, selected_adapters=["mixed"])
    return folder / "mixed"


def save_full(model: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """A model as a checkpoint."""
    (model if dtype is None else model.to(dtype)).save_pretrained(folder)
    return folder


def weighted(base: Path, experts: Sequence[Path], weights: Sequence[float], dtype: torch.dtype) -> nn.Module:
    """The base with the weighted sum merged into its weights by PEFT."""
    model = with_experts(base, experts, dtype)
    model.add_weighted_adapter([e.name for e in experts], list(weights), "mixed", combination_type="cat")
    model.set_adapter("mixed")
    return model.merge_and_unload()


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_an_adapter_that_peft_combined_is_equal(how: str, pair_on: Pair, vit_base: Path, tmp_path: Path) -> None:
    experts = pair_on(vit_base)
    merged = save_combined(with_experts(vit_base, experts), experts, WEIGHTS, how, tmp_path / "out")
    found = pimerge.verify(merged, experts=experts, weights=WEIGHTS)
    assert found.equal, found.summary
    assert found.error is not None
    assert found.error < 1e-5
    assert not pimerge.verify(merged, experts=experts).equal


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm", "t5", "qwen2-lm", "bart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_that_peft_merged_is_equal(
    name: str, dtype: torch.dtype, pair_on: Pair, language_base: Callable[[str], Path], tmp_path: Path
) -> None:
    base = language_base(name)
    experts = pair_on(base, ranks=(2, 4))
    merged = save_full(weighted(base, experts, WEIGHTS, dtype), tmp_path / "full")
    found = pimerge.verify(merged, experts=experts, weights=WEIGHTS, base=base)
    assert found.equal, found.summary
    assert not pimerge.verify(merged, experts=experts, weights=[0.3, 0.6], base=base).equal


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2"])
def test_prefixes_of_a_model_with_a_head(
    name: str, request: pytest.FixtureRequest, pair_on: Pair, tmp_path: Path
) -> None:
    base = request.getfixturevalue(f"{name}_base")
    experts = pair_on(base)
    merged = save_full(weighted(base, experts, WEIGHTS, torch.float32), tmp_path / "full")
    found = pimerge.verify(merged, experts=experts, weights=WEIGHTS)
    assert found.equal, found.summary
    assert any("not in the base" in remark for remark in found.remarks)


def test_the_head_of_an_expert_is_known(make_expert: MakeExpert, bert_base: Path, tmp_path: Path) -> None:
    expert = make_expert(tmp_path / "a", bert_base)
    merged = save_full(PeftModel.from_pretrained(model_for(bert_base), expert).merge_and_unload(), tmp_path / "full")
    found = pimerge.verify(merged, experts=expert)
    assert found.equal, found.summary
    assert "'classifier.weight' is the head of 'a'" in found.remarks
    edit_file(merged, {"classifier.weight": lambda value: value + 1})
    found = pimerge.verify(merged, experts=expert)
    assert found.equal, found.summary
    assert "'classifier.weight' is the head of none of the experts, and not part of the claim" in found.remarks


def edit_file(folder: Path, edits: dict[str, Callable[[Tensor], Tensor | None]]) -> None:
    """Change or remove tensors of a checkpoint."""
    path = folder / "model.safetensors"
    found = load_file(path)
    for key, edit in edits.items():
        value = edit(found.pop(key))
        if value is not None:
            found[key] = value.contiguous()
    save_file(found, path, {"format": "pt"})


def averaged_apart(experts: Sequence[Path], weights: Sequence[float], folder: Path) -> Path:
    """A and B averaged on their own, as programs do that take adapters for plain state dicts."""
    shutil.copytree(experts[0], folder)
    files = [load_file(expert / "adapter_model.safetensors") for expert in experts]
    edit_tensors(
        folder,
        lambda found: found.update(
            {key: sum(w * file[key] for w, file in zip(weights, files, strict=True)) for key in found}
        ),
    )
    return folder


@pytest.mark.parametrize("full", [False, True])
def test_factors_averaged_apart_are_named(full: bool, pair_on: Pair, vit_base: Path, tmp_path: Path) -> None:
    experts = pair_on(vit_base)
    merged = averaged_apart(experts, [0.5, 0.5], tmp_path / "apart")
    if full:
        merged = save_full(PeftModel.from_pretrained(model_for(vit_base), merged).merge_and_unload(), tmp_path / "full")
    found = pimerge.verify(merged, experts=experts)
    assert {each.verdict for each in found.modules} == {"apart"}
    assert found.verdict == "apart"
    assert "in 4 of 4 modules: A and B were averaged apart" in found.summary[0]


def test_pefts_linear_combination_averages_apart(pair_on: Pair, vit_base: Path, tmp_path: Path) -> None:
    experts = pair_on(vit_base)
    merged = save_combined(with_experts(vit_base, experts), experts, WEIGHTS, "linear", tmp_path / "out")
    assert pimerge.verify(merged, experts=experts, weights=WEIGHTS).verdict == "apart"


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("edit", "reason", "factor"),
    [
        ({"lora_alpha": 4}, "the scaling alpha/r was left out", 0.5),
        ({"lora_alpha": 16}, "the update was added twice", 2.0),
        ({"use_rslora": True}, "scaled by alpha/√r in place of alpha/r (rsLoRA)", 2.0),
        ({"lora_alpha": -8}, "the update was subtracted", -1.0),
        ({"lora_alpha": 11}, "another scaling", 11 / 8),
    ],
)
def test_other_scalings_are_named(
    full: bool,
    edit: dict[str, Any],
    reason: str,
    factor: float,
    make_expert: MakeExpert,
    vit_base: Path,
    tmp_path: Path,
) -> None:
    expert = make_expert(tmp_path / "a", vit_base, head=False, r=9 if "use_rslora" in edit else 4, lora_alpha=8)
    merged = set_config(Path(shutil.copytree(expert, tmp_path / "merged")), **edit)
    factor = 3.0 if "use_rslora" in edit else factor
    if full:
        merged = save_full(PeftModel.from_pretrained(model_for(vit_base), merged).merge_and_unload(), tmp_path / "full")
    found = pimerge.verify(merged, experts=[expert])
    assert {each.verdict for each in found.modules} == {"scaled"}
    assert {each.explanation for each in found.modules} == {reason}
    assert found.modules[0].factor == pytest.approx(factor, rel=1e-4)


def test_other_weights_are_found(pair_on: Pair, vit_base: Path, tmp_path: Path) -> None:
    experts = pair_on(vit_base)
    merged = save_full(weighted(vit_base, experts, [0.7, 0.1], torch.float32), tmp_path / "full")
    found = pimerge.verify(merged, experts=experts, weights=WEIGHTS)
    assert found.verdict == "weights"
    assert found.modules[0].weights == pytest.approx([0.7, 0.1], rel=1e-3)
    assert "weights found: 0.7, 0.1" in found.summary[0]
    swapped = pimerge.verify(merged, experts=experts, weights=[0.1, 0.7])
    assert swapped.modules[0].reason == "the weights are in another order"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_without_the_adapter_is_named(dtype: torch.dtype, pair_on: Pair, vit_base: Path, tmp_path: Path) -> None:
    experts = pair_on(vit_base)
    merged = save_full(model_for(vit_base), tmp_path / "full", dtype)
    found = pimerge.verify(merged, experts=experts)
    assert found.verdict == "base"
    assert "in 4 of 4 modules: equals the base: the update was not applied" in found.summary[0]


def test_the_modules_without_the_adapter_are_listed(pair_on: Pair, vit_base: Path, tmp_path: Path) -> None:
    experts = pair_on(vit_base)
    merged = save_full(weighted(vit_base, experts, WEIGHTS, torch.float32), tmp_path / "full")
    before = tensors(save_full(model_for(vit_base), tmp_path / "base"))
    (key,) = (
        key
        for key in before
        if key.endswith("layers.0.attention.q_proj.weight") or "0.attention.attention.query.weight" in key
    )
    edit_file(merged, {key: lambda value: before[key]})
    found = pimerge.verify(merged, experts=experts, weights=WEIGHTS)
    assert [each.verdict for each in found.modules].count("base") == 1
    assert "in 1 of 4 modules (vit.layers.0.attention.q_proj): equals the base" in found.summary[0]


def test_a_transposed_update_is_named(make_expert: MakeExpert, vit_base: Path, tmp_path: Path) -> None:
    expert = make_expert(tmp_path / "a", vit_base, head=False)
    merged = save_full(weighted(vit_base, [expert], [1.0], torch.float32), tmp_path / "full")
    before = tensors(save_full(model_for(vit_base), tmp_path / "base"))
    edit_file(
        merged,
        {
            key: lambda value, key=key: before[key] + (value - before[key]).T
            for key, value in tensors(merged).items()
            if not torch.equal(value, before[key])
        },
    )
    assert pimerge.verify(merged, experts=expert).verdict == "transposed"


@pytest.mark.parametrize("full", [False, True])
def test_a_truncated_update_is_named(full: bool, pair_on: Pair, vit_base: Path, tmp_path: Path) -> None:
    experts = pair_on(vit_base)
    model = with_experts(vit_base, experts)
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "low", combination_type="svd", svd_rank=3)
    model.save_pretrained(tmp_path / "out", selected_adapters=["low"])
    merged = tmp_path / "out" / "low"
    if full:
        model.set_adapter("low")
        merged = save_full(model.merge_and_unload(), tmp_path / "full")
    found = pimerge.verify(merged, experts=experts, weights=WEIGHTS)
    assert found.verdict == "truncated"
    assert {each.rank for each in found.modules} == {3}


def test_a_changed_and_a_missing_tensor_are_named(pair_on: Pair, bert_base: Path, tmp_path: Path) -> None:
    experts = pair_on(bert_base)
    merged = save_full(weighted(bert_base, experts, WEIGHTS, torch.float32), tmp_path / "full")
    edit_file(
        merged,
        {
            "bert.embeddings.LayerNorm.weight": lambda value: value * 1.01,
            "bert.encoder.layer.1.output.dense.bias": lambda value: None,
        },
    )
    found = pimerge.verify(merged, experts=experts, weights=WEIGHTS)
    verdicts = {each.name: str(each.verdict) for each in found.beside}
    assert verdicts == {"embeddings.LayerNorm.weight": "changed", "encoder.layer.1.output.dense.bias": "missing"}
    assert "differs from the base by 1.00%" in " ".join(found.summary)
    assert not found.other_base


def test_another_base_is_named(pair_on: Pair, bert_base: Path, tmp_path: Path) -> None:
    experts = pair_on(bert_base)
    other = shaken(bert_base, tmp_path / "bert", 1)
    merged = save_full(weighted(other, experts, WEIGHTS, torch.float32), tmp_path / "full")
    found = pimerge.verify(merged, experts=experts, weights=WEIGHTS, base=bert_base)
    assert found.other_base
    assert "it was made from another base" in found.summary[0]
    assert pimerge.verify(merged, experts=experts, weights=WEIGHTS, base=other).equal


def test_nan_in_the_merge_is_a_verdict_and_in_an_expert_an_error(pair_on: Pair, vit_base: Path, tmp_path: Path) -> None:
    experts = pair_on(vit_base)
    merged = save_combined(with_experts(vit_base, experts), experts, WEIGHTS, "cat", tmp_path / "out")
    edit_tensors(merged, lambda found: next(iter(found.values())).fill_(float("nan")))
    found = pimerge.verify(merged, experts=experts, weights=WEIGHTS)
    assert found.verdict == "not finite"
    assert found.error is None
    edit_tensors(experts[0], lambda found: next(iter(found.values())).fill_(float("nan")))
    with pytest.raises(PimergeError, match="NaN or Inf"):
        pimerge.verify(merged, experts=experts)


def test_an_adapter_without_a_module_is_named(pair_on: Pair, vit_base: Path, tmp_path: Path) -> None:
    experts = pair_on(vit_base)
    merged = save_combined(with_experts(vit_base, experts), experts, WEIGHTS, "cat", tmp_path / "out")

    def drop(found: dict[str, Tensor]) -> None:
        for key in [key for key in found if "layers.1.attention.v_proj" in key]:
            del found[key]

    edit_tensors(merged, drop)
    found = pimerge.verify(merged, experts=experts, weights=WEIGHTS)
    assert {each.name: str(each.verdict) for each in found.modules if each.verdict != "equal"} == {
        "vit.layers.1.attention.v_proj": "base"
    }


def test_full_checkpoints_are_task_vectors(bert_base: Path, tmp_path: Path) -> None:
    experts = [shaken(bert_base, tmp_path / name, seed) for seed, name in enumerate("ab")]
    base, a, b = map(tensors, (bert_base, *experts))
    merged = shaken(
        bert_base,
        tmp_path / "merged",
        9,
        lambda found: found.update(
            {
                key: value + 0.6 * (a[key] - value) + 0.3 * (b[key] - value)
                for key, value in base.items()
                if value.is_floating_point()
            }
        ),
    )
    found = pimerge.verify(merged, experts=experts, weights=WEIGHTS, base=bert_base)
    assert found.equal, found.summary
    assert len(found.modules) == len(base)
    mean = pimerge.verify(merged, experts=experts, base=bert_base)
    assert mean.modules[0].weights == pytest.approx(WEIGHTS, rel=1e-3)
    with pytest.raises(PimergeError, match="--base"):
        pimerge.verify(merged, experts=experts)


def test_dora_is_compared_with_its_base(make_expert: MakeExpert, vit_base: Path, tmp_path: Path) -> None:
    expert = make_expert(tmp_path / "a", vit_base, head=False, use_dora=True)
    merged = save_full(PeftModel.from_pretrained(model_for(vit_base), expert).merge_and_unload(), tmp_path / "full")
    found = pimerge.verify(merged, experts=expert)
    assert found.equal, found.summary


def test_a_bf16_merge_of_a_float32_base_is_equal(pair_on: Pair, vit_base: Path, tmp_path: Path) -> None:
    experts = pair_on(vit_base)
    merged = save_full(weighted(vit_base, experts, WEIGHTS, torch.float32), tmp_path / "full", torch.bfloat16)
    found = pimerge.verify(merged, experts=experts, weights=WEIGHTS)
    assert found.equal, found.summary
    assert found.error is not None
    assert found.error > 1e-4
    wide = save_full(weighted(vit_base, experts, WEIGHTS, torch.bfloat16).float(), tmp_path / "wide")
    assert pimerge.verify(wide, experts=experts, weights=WEIGHTS).equal


def test_tied_weights_that_were_merged_together_are_remarked(
    pair_on: Pair, language_base: Callable[[str], Path], tmp_path: Path
) -> None:
    base = language_base("qwen2-lm")
    experts = pair_on(base, target_modules=["embed_tokens", "lm_head", "q_proj"])
    for expert in experts:  # PEFT saves the embedding itself as well
        edit_tensors(expert, lambda found: [found.pop(key) for key in list(found) if "base_layer" in key])
    model = with_experts(base, experts).merge_and_unload(adapter_names=["a", "b"])
    found = pimerge.verify(save_full(model, tmp_path / "full"), experts=experts, weights=[1, 1], base=base)
    verdicts = {each.name: str(each.verdict) for each in found.modules}
    assert verdicts["model.layers.0.self_attn.q_proj"] == "equal"
    assert (verdicts["model.embed_tokens"], verdicts["lm_head"]) == ("other", "other")
    assert any("tied weights were merged without untying them" in remark for remark in found.remarks)


def test_a_resized_vocabulary_is_a_change_unless_an_expert_saved_it(
    pair_on: Pair, language_base: Callable[[str], Path], tmp_path: Path
) -> None:
    base = language_base("llama-lm")
    experts = pair_on(base)
    merged = save_full(weighted(base, experts, WEIGHTS, torch.float32), tmp_path / "full")
    edit_file(merged, {"lm_head.weight": lambda value: torch.cat([value, value[:1]])})
    found = pimerge.verify(merged, experts=experts, weights=WEIGHTS, base=base)
    assert (found.verdict, [each.name for each in found.beside]) == ("changed", ["lm_head.weight"])
    assert "its shape is" in found.summary[0]
    head = load_file(merged / "model.safetensors")["lm_head.weight"]
    set_config(experts[0], modules_to_save=["lm_head"])
    edit_tensors(experts[0], lambda tensors: tensors.update({"base_model.model.lm_head.weight": head}))
    found = pimerge.verify(merged, experts=experts, weights=WEIGHTS, base=base)
    assert found.equal, found.summary
    assert "'lm_head.weight' is the head of 'a'" in found.remarks


def test_what_is_left_over_gets_the_closest_weights(pair_on: Pair, vit_base: Path, tmp_path: Path) -> None:
    a, b = pair_on(vit_base)
    merged = save_full(weighted(vit_base, [a, b], WEIGHTS, torch.float32), tmp_path / "full")
    found = pimerge.verify(merged, experts=a, weights=[0.6])
    assert found.verdict == "other"
    assert found.modules[0].weights == pytest.approx([0.6], abs=0.2)
    assert "closest weights" in found.summary[0]


def test_a_missing_shard_is_an_error(pair_on: Pair, language_base: Callable[[str], Path], tmp_path: Path) -> None:
    base = language_base("llama-lm")
    experts = pair_on(base)
    model = weighted(base, experts, WEIGHTS, torch.float32)
    model.save_pretrained(tmp_path / "full", max_shard_size="8KB")
    assert pimerge.verify(tmp_path / "full", experts=experts, weights=WEIGHTS, base=base).equal
    gone = sorted((tmp_path / "full").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(PimergeError, match=gone.name):
        pimerge.verify(tmp_path / "full", experts=experts, weights=WEIGHTS, base=base)


def test_a_slightly_wrong_weight_is_found_below_the_rounding(tmp_path: Path) -> None:
    size, base = 256, {"q.weight": normal(256, 256, scale=0.02).bfloat16()}
    updates = [{"q": (normal(4, size, seed=n), normal(size, 4, seed=n + 9, scale=1e-4))} for n in (1, 2)]
    experts = [raw_expert(tmp_path / name, update) for name, update in zip("ab", updates, strict=True)]
    delta = sum(w * u["q"][1] @ u["q"][0] for w, u in zip((0.63, 0.4), updates, strict=True))
    save_file(base, tmp_path / "base.safetensors")
    save_file({"q.weight": (base["q.weight"].float() + delta).bfloat16()}, tmp_path / "merged.safetensors")
    given = {"experts": experts, "base": tmp_path / "base.safetensors"}
    right = pimerge.verify(tmp_path / "merged.safetensors", weights=[0.63, 0.4], **given)
    assert right.equal, right.summary
    assert right.error is not None
    assert right.error > 0.05
    found = pimerge.verify(tmp_path / "merged.safetensors", weights=[0.6, 0.4], **given)
    assert found.verdict == "weights"
    assert found.modules[0].weights == pytest.approx([0.63, 0.4], abs=5e-3)


def test_the_experts_of_a_mixture_are_compared_one_by_one(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=32, num_key_value_heads=1, num_local_experts=3, **sizes)
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, **targets))
    with torch.no_grad():
        for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(normal(*parameter.shape, seed=seed, scale=0.2))
    model.save_pretrained(tmp_path / "expert")
    merged = save_full(model.merge_and_unload(), tmp_path / "full")
    found = pimerge.verify(merged, experts=tmp_path / "expert", base=tmp_path / "base")
    assert found.equal, found.summary
    assert len(found.modules) == 1 + 2 * 3  # each expert's two halves are stored as matrices of their own
    key = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    edit_file(merged, {key: lambda value: load_file(tmp_path / "base" / "model.safetensors")[key]})
    found = pimerge.verify(merged, experts=tmp_path / "expert", base=tmp_path / "base")
    assert [each.name for each in found.modules if each.verdict == "base"] == [key]


def test_kohyas_files_in_the_checkpoint_of_a_diffusion_model(tmp_path: Path) -> None:
    keys = {"down.0.attn1.to_q": (12, 8), "mid.proj_in": (6, 10)}
    base = {f"{key}.weight": normal(*shape, seed=9) for key, shape in keys.items()}
    merged, files = dict(base), []
    for seed, alpha in ((1, 4.0), (2, 1.0)):
        tensors = {}
        for key, (rows, columns) in keys.items():
            name = f"lora_unet_{key.replace('.', '_')}"
            up, down = normal(rows, 2, seed=seed), normal(2, columns, seed=seed + 5)
            tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
            merged[f"{key}.weight"] = merged[f"{key}.weight"] + 0.5 * alpha / 2 * up @ down
        files.append(tmp_path / f"{seed}.safetensors")
        save_file(tensors, files[-1])
    save_file(base, tmp_path / "base.safetensors")
    save_file(merged, tmp_path / "merged.safetensors")
    given = {"experts": files, "base": tmp_path / "base.safetensors"}
    found = pimerge.verify(tmp_path / "merged.safetensors", **given)
    assert found.equal, found.summary
    assert pimerge.verify(tmp_path / "base.safetensors", **given).verdict == "base"
