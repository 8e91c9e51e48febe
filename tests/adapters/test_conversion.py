"""Variants of LoRA as PEFT makes and loads them, merged into a plain LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import Result

from pimerge.adapters.compatibility import refuse_only_merged
from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from tests.support.bases import model_for
from tests.support.checkpoints import logits
from tests.support.experts import PREFIX, TARGETS, dense_deltas, raw_expert, set_config, updates_of
from tests.support.numerics import normal, relative_difference

Cli = Callable[..., Result]
KINDS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "DoRA with rsLoRA": {"use_dora": True, "use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA with rsLoRA": {"init_lora_weights": "pissa", "use_rslora": True},
    "OLoRA": {"init_lora_weights": "olora"},
    "PiSSA with DoRA": {"init_lora_weights": "pissa", "use_dora": True},
    "OLoRA with DoRA": {"init_lora_weights": "olora", "use_dora": True},
    "KaSA": {"kasa_config": KasaConfig()},
    "KaSA with rsLoRA": {"kasa_config": KasaConfig(), "use_rslora": True},
}
NEEDS_NO_BASE: dict[str, dict[str, Any]] = {
    "EVA": {"init_lora_weights": "eva"},
    "MiCA": {"init_lora_weights": "mica"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "VeLoRA": {"velora_config": VeloraConfig(num_groups=4)},
    "MonteCLoRA": {"monteclora_config": MontecloraConfig(num_samples=2, buffer_size=2)},
    "BD-LoRA in B": {"use_bdlora": BdLoraConfig(target_modules_bd_b=["query", "value"], nblocks=2), "r": 4},
    "BD-LoRA in A": {"use_bdlora": BdLoraConfig(["query"], nblocks=4, match_strict=False), "r": 4, "use_rslora": True},
    "biases that were not trained": {"bias": "lora_only", "init_lora_weights": "gaussian"},
}
"""Variants whose update depends on nothing but the file."""
KINDS |= NEEDS_NO_BASE
CASES = [(kind, base) for kind in KINDS for base in ("bert", "vit") if kind not in NEEDS_NO_BASE]
CASES += [(kind, "gpt2") for kind in ("DoRA", "DoRA with rsLoRA", "PiSSA", "PiSSA with DoRA")]


KINDS["DoRA of a convolution"] = {"use_dora": True, "target_modules": ["projection", "value"]}
KINDS["DoRA of an embedding"] = {"use_dora": True, "target_modules": ["word_embeddings", "value"]}
CASES += [
    ("DoRA of a convolution", "vit"),
    ("DoRA of an embedding", "bert"),
    *((kind, "bert") for kind in NEEDS_NO_BASE),
]


def trained(folder: Path, base: Path, seed: int = 0, **config: Any) -> Path:
    """An expert as PEFT starts it, every trainable number moved as training would."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[base.name], "fan_in_fan_out": base.name == "gpt2"}
    torch.manual_seed(seed)
    model = get_peft_model(model_for(base), LoraConfig(**(settings | config)))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith("base_layer.bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def plugged(base: Path, folder: str | Path) -> PeftModel:
    """The base as published with an adapter, by PEFT."""
    return PeftModel.from_pretrained(model_for(base), str(folder)).eval()


def weights_of(model: PeftModel) -> dict[str, Tensor]:
    """All weights with the adapter merged in by PEFT."""
    merged: nn.Module = model.merge_and_unload()
    return {key: value.double() for key, value in merged.state_dict().items()}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_one_expert_and_the_mean_of_two_answer_as_in_peft(
    kind: str, name: str, cli: Cli, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(f"{name}_base")
    a, b = (trained(Path(folder), base, seed, **KINDS[kind]) for seed, folder in enumerate("ab"))
    for experts, output in (([a], "one"), ([a, b], "two")):
        result = cli("merge", *experts, "--base", base, "-o", output, "--verify", "-q")
        assert result.exit_code == 0, result.exception
        config = json.loads(Path(output, "adapter_config.json").read_text())
        assert not config.get("use_dora")
        assert config.get("init_lora_weights") not in ("pissa", "olora")
        assert open_expert(output).modules.keys() == open_expert(a, str(base), convert=True).modules.keys()
    wanted = logits(plugged(base, a), name)
    torch.testing.assert_close(logits(plugged(base, "one"), name), wanted, rtol=0, atol=1e-4)
    start = {key: value.double() for key, value in model_for(base).state_dict().items()}
    one = weights_of(plugged(base, "one"))
    first, second = (weights_of(plugged(base, folder)) for folder in (a, b))
    for module in open_expert("one").modules:
        key = f"{module}.weight"
        assert relative_difference(first[key], start[key]) > 1e-2
        assert relative_difference(one[key] - start[key], first[key] - start[key]) < 1e-5
    reference = model_for(base)
    reference.load_state_dict({key: ((value + second[key]) / 2).float() for key, value in first.items()})
    torch.testing.assert_close(logits(plugged(base, "two"), name), logits(reference, name), rtol=0, atol=1e-4)


def test_what_is_converted_merges_with_plain_lora_by_any_method(cli: Cli, bert_base: Path) -> None:
    trained(Path("dora"), bert_base, use_dora=True)
    trained(Path("plain"), bert_base, 1)
    result = cli("merge", "dora", "plain", "--base", bert_base, "--method", "task-arithmetic", "--scale", "0.5")
    assert result.exit_code == 0, result.exception
    assert "'dora' is DoRA: converted to ΔW with the base's weights" in result.stderr
    start = {key: value.double() for key, value in model_for(bert_base).state_dict().items()}
    dora, plain, found = (weights_of(plugged(bert_base, folder)) for folder in ("dora", "plain", "merged"))
    for key, value in start.items():
        expected = 0.5 * (dora[key] - value) + 0.5 * (plain[key] - value)
        torch.testing.assert_close(found[key] - value, expected, rtol=0, atol=1e-6)
    assert cli("merge", "dora", "plain", "--base", bert_base, "--method", "ties", "--force").exit_code == 0
    merged = weights_of(plugged(bert_base, "merged"))
    changed = {key for key, value in start.items() if not torch.equal(merged[key], value)}
    assert changed == {key for key, value in start.items() if not torch.equal(dora[key], value)} > set()


def test_a_target_may_be_converted_too(cli: Cli, bert_base: Path) -> None:
    trained(Path("dora"), bert_base, use_dora=True, modules_to_save=["classifier"])
    result = cli("merge", "dora", "--base", bert_base, "--target", "dora", "--head", "none")
    assert result.exit_code == 0, result.exception
    dora, found = (weights_of(plugged(bert_base, folder)) for folder in ("dora", "merged"))
    for module in open_expert("merged").modules:
        torch.testing.assert_close(found[f"{module}.weight"], dora[f"{module}.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("given", [["--rank", "2"], ["--energy", "0.9"], ["--rank", "auto"]])
def test_a_truncation_of_dora_reports_its_error(given: list[str], cli: Cli, bert_base: Path) -> None:
    trained(Path("dora"), bert_base, use_dora=True)
    result = cli("merge", "dora", "--base", bert_base, *given, "--json")
    document = json.loads(result.stdout)
    start = {key: value.double() for key, value in model_for(bert_base).state_dict().items()}
    whole, found = weights_of(plugged(bert_base, "dora")), weights_of(plugged(bert_base, "merged"))
    assert document["truncation"] > 0
    for name, said in document["modules"].items():
        key = f"{name}.weight"
        assert relative_difference(found[key] - start[key], whole[key] - start[key]) == pytest.approx(
            said["truncation"], rel=1e-3
        )


@pytest.mark.parametrize("kind", ["DoRA", "PiSSA", "OLoRA"])
def test_without_a_base_given_they_are_refused_with_a_hint(kind: str, cli: Cli, bert_base: Path) -> None:
    trained(Path("a"), bert_base, **KINDS[kind])
    result = cli("merge", "a")
    assert isinstance(result.exception, PimergeError)
    assert kind in str(result.exception)
    assert "'pimerge merge --base BASE' converts it" in str(result.exception)
    assert not Path("merged").exists()


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_inits_that_cannot_be_computed_again_are_refused_also_with_a_base(init: str, cli: Cli, bert_base: Path) -> None:
    set_config(trained(Path("a"), bert_base), init_lora_weights=init)
    result = cli("merge", "a", "--base", bert_base)
    assert isinstance(result.exception, PimergeError)
    assert f"init_lora_weights is '{init}'" in str(result.exception)


def test_olora_of_a_conv1d_is_refused(cli: Cli, gpt2_base: Path) -> None:
    set_config(trained(Path("a"), gpt2_base), init_lora_weights="olora")
    result = cli("merge", "a", "--base", gpt2_base)
    assert isinstance(result.exception, PimergeError)
    assert "OLoRA is converted for Linear layers only" in str(result.exception)


@pytest.mark.parametrize("kind", NEEDS_NO_BASE)
def test_a_variant_that_leaves_the_base_as_it_is_needs_no_base(kind: str, cli: Cli, bert_base: Path) -> None:
    trained(Path("a"), bert_base, **NEEDS_NO_BASE[kind])
    result = cli("merge", "a", "-q")
    assert result.exit_code == 0, result.exception
    wanted = logits(plugged(bert_base, "a"), "bert")
    torch.testing.assert_close(logits(plugged(bert_base, "merged"), "bert"), wanted, rtol=0, atol=1e-5)


def test_qalora_averages_groups_of_inputs(cli: Cli) -> None:
    A, B, group = normal(2, 3), normal(5, 2, seed=1), 4
    raw_expert(Path("a"), {"q": (A, B)}, lora_alpha=3, use_qalora=True, qalora_group_size=group)
    assert cli("merge", "a", "-q").exit_code == 0
    inputs = normal(6, 12, seed=2)
    pooled = inputs.view(6, 3, group).mean(dim=2) * 3  # as in the layer's forward pass
    (found,) = dense_deltas(open_expert("merged")).values()
    torch.testing.assert_close(inputs @ found.float().T, pooled @ A.T @ B.T * 3 / 2)


def test_trained_biases_are_kept_and_untrained_ones_are_not(cli: Cli, bert_base: Path) -> None:
    folder = trained(Path("a"), bert_base, bias="all")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    biases = [key for key in tensors if key.endswith(".bias")]
    assert len(biases) > 10
    assert cli("merge", "a", "-q", "--output", "kept").exit_code == 0
    kept = load_file(Path("kept/adapter_model.safetensors"))
    own = {f"{PREFIX}{key}": value for key, value in model_for(bert_base).state_dict().items()}
    for key in (key for key in biases if ".classifier" not in key):
        torch.testing.assert_close(kept.get(key, own[key.replace(".base_layer.", ".")]), tensors[key])
    with pytest.raises(PimergeError, match="trained biases of the base"):
        refuse_only_merged([open_expert(folder)], "tuned")
    same = {key: own[key.replace(".base_layer.", ".")] for key in biases if ".classifier" not in key}
    save_file({**{key: value for key, value in tensors.items() if key not in biases}, **same}, file)
    assert cli("merge", "a", "-q").exit_code == 0
    assert not [key for key in load_file(Path("merged/adapter_model.safetensors")) if key.endswith(".bias")]
    set_config(folder, base_model_name_or_path="org/elsewhere")
    assert cli("merge", "a", "-q", "--force").exit_code == 0  # nothing tells whether they were trained
    assert [key for key in load_file(Path("merged/adapter_model.safetensors")) if key.endswith(".bias")]


def test_layer_replication_is_kept(cli: Cli) -> None:
    copies = [[0, 2], [1, 2]]
    for seed, name in enumerate("ab"):
        set_config(raw_expert(Path(name), updates_of({"q": (4, 2, 5)}, seed)), layer_replication=copies)
    assert cli("merge", "a", "b", "-q").exit_code == 0
    assert json.loads(Path("merged/adapter_config.json").read_text())["layer_replication"] == copies
    set_config(Path("b"), layer_replication=None)
    assert "copy other layers" in str(cli("merge", "a", "b", "--force").exception)
