"""The layout of LoRA, against PEFT's own layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.keys import key_of_parameter
from pimerge.adapters.lora_module import pattern_value, stored
from pimerge.core.errors import PimergeError
from tests.support.bases import layers, model_for
from tests.support.experts import PREFIX, MakeExpert, layers_expert, raw_expert, set_config, set_tensors, updates_of
from tests.support.numerics import normal, small


def peft_layers(model: nn.Module, folder: Path) -> dict[str, Any]:
    """PEFT's layer for each adapted module."""
    plugged = PeftModel.from_pretrained(model, str(folder))
    return {
        name.removeprefix(PREFIX): layer
        for name, layer in plugged.named_modules()
        if "default" in getattr(layer, "r", {})
    }


def assert_as_peft(expert: Expert, model: nn.Module) -> None:
    """Rank, alpha, scaling and ΔW of every module are those of PEFT's layers."""
    found = peft_layers(model, expert.path)
    assert expert.modules.keys() == found.keys()
    for name, layer in found.items():
        module, factors = expert.modules[name], expert.factors(name)
        assert (module.rank, module.alpha) == (layer.r["default"], layer.lora_alpha["default"])
        assert module.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        expected = layer.get_delta_weight("default").detach()
        if type(layer).__name__ == "Embedding" or getattr(layer, "fan_in_fan_out", False):
            expected = expected.T
        delta = module.scaling * factors.B @ factors.A
        torch.testing.assert_close(delta, expected.reshape(module.d_out, module.d_in), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", ["vit", "bert", "gpt2"])
def test_scaling_and_updates_are_those_of_peft(
    name: str, use_rslora: bool, tmp_path: Path, make_expert: MakeExpert, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(f"{name}_base")
    one = {"vit": "layers.0.attention.q_proj", "bert": "layer.0.attention.self.query", "gpt2": "h.0.attn.c_attn"}[name]
    folder = make_expert(
        tmp_path / "e", base, rank_pattern={one: 2}, alpha_pattern={one.replace("0", "1"): 5}, use_rslora=use_rslora
    )
    expert = open_expert(folder)
    assert_as_peft(expert, model_for(base))
    assert len({module.scaling for module in expert.modules.values()}) > 1
    saved = load_file(folder / "adapter_model.safetensors")
    assert {PREFIX + name for name in expert.head} == {key for key in saved if "lora_" not in key}
    assert expert.head


def test_conv_embedding_and_linear_have_the_updates_of_peft(tmp_path: Path) -> None:
    folder = layers_expert(tmp_path / "e", target_modules=["words", "proj", "conv"], rank_pattern={"inner.proj": 1})
    expert = open_expert(folder)
    assert {name: module.layer for name, module in expert.modules.items()} == {
        "words": "embedding",
        "proj": "linear",
        "inner.proj": "linear",
        "conv": "conv",
    }
    assert_as_peft(expert, layers())


def test_lora_bias_is_read_and_scaled_as_peft_scales_it(tmp_path: Path) -> None:
    expert = open_expert(layers_expert(tmp_path / "e", target_modules=["other"], lora_bias=True, lora_alpha=7))
    layer = peft_layers(layers(), expert.path)["inner.other"]
    factors = expert.factors("inner.other")
    x = normal(5, 6)
    expected = layer(x) - layer.base_layer(x)
    assert factors.bias is not None
    found = factors.scaling * (x @ factors.A.T @ factors.B.T + factors.bias)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)


PIECES = st.lists(st.sampled_from(["q", "v", "q_proj", "layers", "0", "1", "self"]), min_size=1, max_size=4).map(
    ".".join
)
PATTERNS = st.dictionaries(
    PIECES | st.sampled_from([".*q", r"layers\.[01]\.q", "q|v", "^q", "proj"]), st.integers(1, 9)
)


@small
@given(PATTERNS, PIECES)
def test_patterns_match_as_in_peft(pattern: dict[str, int], name: str) -> None:
    assert pattern_value(pattern, name, 99) == pattern.get(get_pattern_key(pattern.keys(), name), 99)


@pytest.mark.parametrize("targets", [["words"], ["conv"], ["proj", "other"]])
def test_stored_is_the_inverse_of_factors(targets: list[str], tmp_path: Path) -> None:
    folder = layers_expert(tmp_path / "e", target_modules=targets, lora_bias=targets != ["words"], lora_alpha=2)
    expert = open_expert(folder)
    again: dict[str, Tensor] = {}
    for name, module in expert.modules.items():
        again |= stored(module, expert.factors(name))
    saved = load_file(folder / "adapter_model.safetensors")
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)


def plain(folder: Path, **config: Any) -> Path:
    """A small expert with some fields of its config changed."""
    return set_config(raw_expert(folder, updates_of({"q": (3, 2, 4)})), **config)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("use_dora", True, "DoRA"),
        ("init_lora_weights", "pissa", "PiSSA"),
        ("init_lora_weights", "pissa_niter_16", "PiSSA"),
        ("init_lora_weights", "olora", "OLoRA"),
        ("init_lora_weights", "corda", "CorDA"),
        ("init_lora_weights", "loftq", "LoftQ"),
        ("init_lora_weights", "lora_ga", "LoRA-GA"),
        ("init_lora_weights", "of_tomorrow", "of_tomorrow"),
        ("alora_invocation_tokens", [1], "aLoRA"),
        ("arrow_config", {"top_k": 2}, "Arrow"),
        ("megatron_config", {"hidden_size": 4}, "Megatron"),
        ("enable_lora", [True, False, True], "fused projection"),
        ("kasa_config", {"beta": 1e-4}, "KaSA"),
        ("a_field_of_tomorrow", True, "a_field_of_tomorrow"),
        ("peft_type", None, "no peft_type"),
        ("r", 3, "the tensors have rank 2, adapter_config.json says 3"),
        ("rank_pattern", {"q": 1}, "the tensors have rank 2, adapter_config.json says 1"),
    ],
)
def test_what_cannot_be_handled_is_refused_by_name(field: str, value: Any, named: str, tmp_path: Path) -> None:
    fields = {"rank_pattern": {}, field: value}
    with pytest.raises(PimergeError, match=named):
        open_expert(plain(tmp_path / "e", **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"velora_config": {"num_groups": 2}},
        {"monteclora_config": {"num_samples": 2}},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"merge_weights": True, "enable_lora": None},
        {"lorap_emb_lr": 1e-6, "lorap_lr_ratio": 16.0},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"a_field_of_tomorrow": None},
        {"another": False},
        {"lora_dropout": 0.1, "peft_version": "9.9", "layers_to_transform": [0]},
        {"bias": None, "rank_pattern": None, "alpha_pattern": None, "use_rslora": None},
    ],
)
def test_fields_that_change_no_tensor_are_no_problem(fields: dict[str, Any], tmp_path: Path) -> None:
    assert open_expert(plain(tmp_path / "e", **fields)).modules["q"].scaling == 1.0


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": [1]},
        {"rank_pattern": {"(": 2}},
        {"alpha_pattern": {"q": "4"}},
        {"lora_alpha": 10**400},
        {"lora_alpha": True},
        {"lora_alpha": float("nan")},
        {"r": None},
        {"modules_to_save": "head"},
        {"modules_to_save": [1]},
        {"base_model_name_or_path": 5},
        {"revision": 5},
        {"use_rslora": "yes"},
        {"init_lora_weights": ["pissa"]},
    ],
)
def test_fields_of_a_wrong_type_are_refused_by_name(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match=next(iter(fields))):
        open_expert(plain(tmp_path / "e", **fields))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"q.lora_A.weight": None}, "module 'q' has no factor A"),
        ({"q.lora_B.weight": None}, "module 'q' has no factor B"),
        ({"q.lora_B.weight": normal(3, 1)}, r"A is \(2, 4\) and B is \(3, 1\)"),
        (
            {"q.lora_A.weight": torch.ones(2, 0)},
            r"1 of 2 tensors of the adapter are empty, such as \S+ \(2, 0\): .*ZeRO-3",
        ),
        ({"q.lora_B.bias": torch.ones(4)}, r"lora_B.bias is \(4,\), expected \(3,\)"),
        ({"q.lora_A.bias": torch.ones(3)}, "neither LoRA factors nor in modules_to_save: .*q.lora_A.bias"),
        ({"q.lora_magnitude_vector": torch.ones(3)}, "q.lora_magnitude_vector"),
        ({"embed.weight": torch.ones(3)}, "embed.weight"),
        ({"headless.weight": torch.ones(3)}, "headless.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tensors: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    folder = plain(tmp_path / "e", modules_to_save=["head"])
    set_tensors(folder, {PREFIX + name: tensor for name, tensor in tensors.items()})
    with pytest.raises(PimergeError, match=message):
        open_expert(folder)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    folder = plain(
        tmp_path / "e",
        use_dora=True,
        init_lora_weights="pissa",
        arrow_config={"top_k": 1},
        r=7,
        rank_pattern={},
        unknown=1,
    )
    set_tensors(folder, {PREFIX + "k.lora_A.weight": normal(2, 4), "stray": normal(1)})
    with pytest.raises(PimergeError) as caught:
        open_expert(folder)
    messages = "\n".join(problem.message for problem in caught.value.problems)
    for named in ("DoRA", "PiSSA", "Arrow", "says 7", "'unknown'", "module 'k' has no factor B", "stray"):
        assert named in messages
    assert len(caught.value.problems) == 7


def test_peft_itself_writes_dora_that_is_refused(tmp_path: Path, vit_base: Path, make_expert: MakeExpert) -> None:
    folder = make_expert(tmp_path / "e", vit_base, use_dora=True)
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"]
    with pytest.raises(PimergeError, match="DoRA") as caught:
        open_expert(folder)
    assert "--base BASE" in str(caught.value)
    modules = open_expert(folder, convert=True).modules
    assert {module.conversions for module in modules.values()} == {("DoRA",)}


def test_an_embedding_saved_beside_the_factors_is_refused_by_name(tmp_path: Path) -> None:
    folder = layers_expert(tmp_path / "e", target_modules=["words"])
    set_tensors(folder, {PREFIX + "words.weight": normal(7, 6)})
    with pytest.raises(PimergeError, match=r"words\.weight"):
        open_expert(folder)


def test_keys_of_parameters_are_those_of_the_file(tmp_path: Path, vit_base: Path, make_expert: MakeExpert) -> None:
    folder = make_expert(tmp_path / "e", vit_base, lora_bias=True, head=False)
    model = PeftModel.from_pretrained(model_for(vit_base), str(folder), is_trainable=True)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key_of_parameter(name) for name in names} == set(load_file(folder / "adapter_model.safetensors"))


def test_merging_plain_loras_imports_neither_peft_nor_transformers(tmp_path: Path) -> None:
    folders = [layers_expert(tmp_path / name, target_modules=["proj"]) for name in "ab"]
    code = (
        "import sys\n"
        "import torch\n"
        "from pimerge.adapters.expert import open_expert\n"
        "from pimerge.adapters.low_rank import EVERYTHING, weighted_sum\n"
        f"experts = [open_expert(folder) for folder in {[str(folder) for folder in folders]}]\n"
        "for name in experts[0].modules:\n"
        "    weighted_sum([each.factors(name) for each in experts], [0.5, 0.5], EVERYTHING, torch.float32)\n"
        "print(sorted({'peft', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("bias", [False, True])
def test_its_parameters_are_counted_as_by_peft(bias: bool, tmp_path: Path) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(5, 3), "conv": nn.Conv2d(2, 4, (3, 2)), "table": nn.Embedding(11, 7)})
    targets = ["linear", "conv"] if bias else [*model]  # PEFT refuses biases of embeddings
    trained = get_peft_model(model, LoraConfig(r=2, target_modules=targets, lora_bias=bias))
    trained.save_pretrained(tmp_path)
    assert open_expert(tmp_path).parameters == trained.get_nb_trainable_parameters()[0]
