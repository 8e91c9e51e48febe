"""Every kind's squared gradients against a loop over single examples, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from peft import LNTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, T5Config, T5EncoderModel

from pimerge.embedding.fisher import diagonal_fisher
from pimerge.peft_methods import BottleneckConfig
from tests.support.experts import KINDS, PROMPTS, PeftCase
from tests.support.numerics import relative_difference

COUNT = 6


def nll(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    scores = model(**inputs).logits.log_softmax(1)
    return -scores[torch.arange(len(scores)), batch["labels"]]


CASES = [(kind, base) for kind in KINDS for base in ("bert", "gpt2", "vit") if not (kind in PROMPTS and base == "vit")]


@pytest.mark.parametrize(("kind", "base"), CASES)
def test_the_fisher_of_every_kind_is_the_loops(peft_case: PeftCase, kind: str, base: str) -> None:
    model, examples, singles = peft_case(base, COUNT, torch.float64, kind=kind)
    model.double()  # PEFT keeps prompts in float32
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    reference = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for single in singles:
        found = torch.autograd.grad(nll(model, single).sum(), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                reference[name] += gradient.square() / COUNT
    fisher = diagonal_fisher(model, parameters, [[3, 0, 5], [1, 2, 4]], examples.batch, nll)
    # GPT-2 reads its answer off the last position, which it cannot know of a prompt with padding behind the text
    assert fisher.route == ("loop" if (kind, base) == ("prompt", "gpt2") else "rules"), fisher.why_loop
    assert sum(float(value.sum()) for value in reference.values()) > 0
    whole = sum(float(value.square().sum()) for value in reference.values()) ** 0.5
    for name, value in reference.items():
        difference = float((fisher.diagonal[name] - value).norm())
        assert difference < 1e-9 * float(value.norm()) + 1e-12 * whole, name


def rms_models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    t5 = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return {"llama": LlamaModel(llama), "t5": T5EncoderModel(t5)}


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("kind", ["ln_tuning", "bottleneck"])
def test_rms_norms_and_blocks_of_other_architectures(name: str, kind: str) -> None:
    norms = {"llama": ["input_layernorm", "post_attention_layernorm", "norm"], "t5": ["layer_norm", "final_layer_norm"]}
    config = BottleneckConfig(bottleneck_dim=3, init_weights=False) if kind == "bottleneck" else None
    model = get_peft_model(rms_models()[name], config or LNTuningConfig(target_modules=norms[name])).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    ids = torch.randint(1, 30, (5, 7), generator=torch.Generator().manual_seed(1))

    def nll(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).last_hidden_state.sin().sum((1, 2))

    def batch(indices: Sequence[int]) -> dict[str, Tensor]:
        return {"input_ids": ids[list(indices)], "attention_mask": torch.ones_like(ids[list(indices)])}

    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    reference = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for index in range(5):
        gradients = torch.autograd.grad(nll(model, batch([index])).sum(), list(parameters.values()))
        for key, gradient in zip(parameters, gradients, strict=True):
            reference[key] += gradient.square() / 5
    fisher = diagonal_fisher(model, parameters, [[3, 0], [1, 2, 4]], batch, nll)
    assert fisher.route == "rules", fisher.why_loop
    for key, value in reference.items():
        assert relative_difference(fisher.diagonal[key], value) < 1e-9, key
