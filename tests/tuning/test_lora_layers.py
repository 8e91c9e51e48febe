"""Several experts in one model: against the dense formula, autograd's own gradients, and PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.kind import AdapterHeader
from pimerge.adapters.kinds.lora import parse
from pimerge.adapters.lora_module import Factors
from pimerge.core.errors import PimergeError
from pimerge.models.heads import set_head
from pimerge.tuning.lora_layers import LoraComponent, MixedLinear, _mixed_type, mix_lora
from pimerge.tuning.mixed_linear import PLANS, cheapest_plan, mixed_linear
from pimerge.tuning.mixture import ChannelMixture, FreeMixture, Mixture, Switch, group_modules
from tests.support.bases import model_for
from tests.support.experts import MakeExpert, dense_deltas
from tests.support.numerics import logits_of, relative_difference

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0, requires_grad: bool = True) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_(requires_grad)


def dense(x: Tensor, scale: Tensor, A: Tensor, B: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (W0 + B diag(scale) A)ᵀ + b, written out."""
    output = x @ (weight + B @ torch.diag(scale) @ A).T
    return output if bias is None else output + bias


def operands(shape: Sequence[int], d_in: int, d_out: int, R: int) -> list[Tensor]:
    return [
        random(*shape, d_in, seed=1),
        random(R, seed=2),
        random(R, d_in, seed=3),
        random(d_out, R, seed=4),
        random(d_out, d_in, seed=5, requires_grad=False),
        random(d_out, seed=6, requires_grad=False),
    ]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("trained", [("x",), ("scale",), ("x", "scale"), ("scale", "A", "B"), ("x", "scale", "A", "B")])
def test_gradients_are_those_of_finite_differences(plan: str, trained: Sequence[str]) -> None:
    named = dict(zip(("x", "scale", "A", "B"), operands((2, 3), 4, 5, 3)[:4], strict=True))
    *_, weight, bias = operands((2, 3), 4, 5, 3)
    fixed = {name: value.detach() for name, value in named.items()}

    def run(*values: Tensor) -> Tensor:
        given = fixed | dict(zip(trained, values, strict=True))
        return mixed_linear(given["x"], given["scale"], given["A"], given["B"], weight, bias, plan)

    assert torch.autograd.gradcheck(run, [named[name] for name in trained])


@pytest.mark.parametrize("plan", [*PLANS, None])
@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    d_in=st.integers(1, 6),
    d_out=st.integers(1, 6),
    R=st.integers(1, 9),
    biased=st.booleans(),
)
def test_every_plan_is_the_dense_formula_with_its_gradients(
    plan: str | None, shape: list[int], d_in: int, d_out: int, R: int, biased: bool
) -> None:
    *trained, weight, bias = operands(shape, d_in, d_out, R)
    offset = bias if biased else None
    found, expected = mixed_linear(*trained, weight, offset, plan), dense(*trained, weight, offset)
    torch.testing.assert_close(found, expected)
    g = random(*found.shape, seed=7, requires_grad=False)
    torch.testing.assert_close(torch.autograd.grad(found, trained, g), torch.autograd.grad(expected, trained, g))


@pytest.mark.parametrize("plan", PLANS)
def test_frozen_factors_get_no_gradient(plan: str) -> None:
    x, scale, A, B, weight, bias = operands((3,), 4, 5, 2)
    A.requires_grad_(False)
    B.requires_grad_(False)
    mixed_linear(x, scale, A, B, weight, bias, plan).sum().backward()
    expected = torch.autograd.grad(dense(x, scale, A, B, weight, bias).sum(), (x, scale))
    torch.testing.assert_close((x.grad, scale.grad), expected)
    assert A.grad is B.grad is None


def test_the_cheapest_plan_is_the_one_with_the_fewest_multiplications() -> None:
    for tokens in (1, 64, 4096):
        for R in (4, 64, 1024):
            for trains in (False, True):
                tall = tokens * R * (384 + 384)
                square = R * 384 * 384
                costs = {
                    "stack": tall * (2 + trains),
                    "materialise": square + tall * (1 + trains),
                    "materialise-dense": square * (2 + trains) + tokens * 384 * 384,
                }
                assert costs[cheapest_plan(tokens, 384, 384, R, trains)] == min(costs.values())


@pytest.mark.parametrize("plan", PLANS)
def test_bfloat16_stays_near_float32(plan: str) -> None:
    exact = [value.detach() for value in operands((8,), 32, 32, 6)]
    rounded = [value.to(torch.bfloat16) for value in exact]
    found = mixed_linear(*rounded, plan)
    assert found.dtype == torch.bfloat16
    assert relative_difference(found, dense(*exact)) < 0.02


@pytest.mark.parametrize("plan", PLANS)
def test_an_update_far_below_the_bases_rounding_is_not_lost_in_bfloat16(plan: str) -> None:
    _, scale, A, B, _, bias = (value.detach() for value in operands((8,), 32, 32, 6))
    x = torch.eye(32, dtype=torch.float64)[:8] - torch.eye(32, dtype=torch.float64)[8:16]
    weight = torch.full((32, 32), 1024.0, dtype=torch.float64)  # x W0ᵀ is 0, and W0 + ΔW would round to W0
    exact = [x, 1e-2 * scale, A, B, weight, 0 * bias]
    found = mixed_linear(*(value.to(torch.bfloat16) for value in exact), plan)
    assert relative_difference(found, dense(*exact)) < 0.02


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank": {"r": 2, "lora_alpha": 5},
    "rslora": {"use_rslora": True},
    "fewer": {"layers_to_transform": [1]},
    "bias": {"lora_bias": True},
}
MODULES = {"vit": ["v_proj", "o_proj"], "bert": ["value", "key"], "gpt2": ["c_fc", "c_proj"]}
OTHERS = {"vit": ["projection", "v_proj"], "bert": ["word_embeddings", "position_embeddings"], "gpt2": ["wte", "c_fc"]}
"""Convolutions and embeddings among them."""
Inputs = Mapping[str, Tensor]


@pytest.fixture(scope="module", params=["vit", "bert", "gpt2"])
def pool(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert
) -> tuple[Path, dict[str, Expert], Inputs]:
    """A base, experts of every form on it, and inputs."""
    base: Path = request.getfixturevalue(f"{request.param}_base")
    configs = CONFIGS | {"modules": {"target_modules": MODULES[base.name]}}
    folder = tmp_path_factory.mktemp("composition")
    experts = {
        name: open_expert(make_expert(folder / name, base, seed=seed, init_seed=seed, **config))
        for seed, (name, config) in enumerate(configs.items())
    }
    generator = torch.Generator().manual_seed(0)
    if base.name == "vit":
        return base, experts, {"pixel_values": torch.rand(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(4, 20, (3, 7), generator=generator)
    ids[0, 5:] = 0
    return base, experts, {"input_ids": ids, "attention_mask": (ids > 0).long()}


def component_of(expert: Expert) -> LoraComponent:
    return LoraComponent(expert.name, expert.modules, {name: expert.factors(name) for name in expert.modules})


def mixed(
    base: Path, experts: Sequence[Expert], start: Sequence[float], trained: bool = False
) -> tuple[nn.Module, dict[str, MixedLinear]]:
    model = model_for(base)
    mixture = Mixture(sorted({name for expert in experts for name in expert.modules}), start, "matrix", True)
    return model, mix_lora(model, [component_of(expert) for expert in experts], mixture, trained)


@pytest.mark.parametrize("name", [*CONFIGS, "modules"])
def test_one_expert_gives_pefts_own_logits(pool: tuple[Path, dict[str, Expert], Inputs], name: str) -> None:
    base, experts, inputs = pool
    expected = PeftModel.from_pretrained(model_for(base), experts[name].path).eval()
    model, _ = mixed(base, [experts[name]], [0.0])
    set_head(model, experts[name].head_tensors())
    torch.testing.assert_close(logits_of(model, inputs), logits_of(expected, inputs), atol=1e-5, rtol=1e-5)


def test_several_experts_are_the_weighted_sum_of_dense_updates(
    pool: tuple[Path, dict[str, Expert], Inputs],
) -> None:
    base, named, inputs = pool
    experts, start = list(named.values()), [0.3, -0.2, 1.0, 0.0, 0.5, -1.0]
    weights = torch.tensor(start).softmax(0).tolist()
    expected = model_for(base)
    for weight, expert in zip(weights, experts, strict=True):
        for name, delta in dense_deltas(expert).items():
            layer, factors = expected.get_submodule(name), expert.factors(name)
            layer.weight.data += weight * (delta.T if isinstance(layer, Conv1D) else delta).float()
            if factors.bias is not None:
                layer.bias.data += weight * factors.scaling * factors.bias
    model, _ = mixed(base, experts, start)
    torch.testing.assert_close(logits_of(model, inputs), logits_of(expected, inputs), atol=1e-5, rtol=1e-4)


def test_an_expert_with_embeddings_or_convolutions_gives_pefts_own_logits(
    pool: tuple[Path, dict[str, Expert], Inputs], make_expert: MakeExpert, tmp_path: Path
) -> None:
    base, _, inputs = pool
    expert = open_expert(make_expert(tmp_path / "x", base, target_modules=OTHERS[base.name]))
    expected = PeftModel.from_pretrained(model_for(base), expert.path).eval()
    model, _ = mixed(base, [expert], [0.0])
    set_head(model, expert.head_tensors())
    torch.testing.assert_close(logits_of(model, inputs), logits_of(expected, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_parts_is_the_inverse_of_composing(pool: tuple[Path, dict[str, Expert], Inputs], trained: bool) -> None:
    base, named, _ = pool
    experts = list(named.values())
    _, layers = mixed(base, experts, [0.0] * len(experts), trained)
    assert layers.keys() == {name for expert in experts for name in expert.modules}
    for name, layer in layers.items():
        for expert, part in zip(experts, layer.parts(len(experts)), strict=True):
            if name not in expert.modules:
                assert part is None
                continue
            own = expert.factors(name)
            assert part is not None
            assert torch.equal(part.A, own.A)
            assert torch.equal(part.B, own.B)
            assert part.scaling == pytest.approx(own.scaling)
            expected = torch.zeros(len(own.B)) if own.bias is None else own.bias
            assert torch.equal(torch.zeros(len(own.B)) if part.bias is None else part.bias, expected)


@pytest.mark.parametrize("trained", [False, True])
def test_only_what_is_to_train_requires_gradients(pool: tuple[Path, dict[str, Expert], Inputs], trained: bool) -> None:
    base, named, inputs = pool
    experts = list(named.values())
    model, layers = mixed(base, experts, [0.0] * len(experts), trained)
    for parameter in model.parameters():
        parameter.grad = None
    for layer in layers.values():
        assert layer.A.requires_grad == layer.B.requires_grad == trained
        layer.layer.requires_grad_(False)
    model(**inputs).logits.square().sum().backward()
    mixture = next(iter(layers.values())).mixture
    assert mixture.logits.grad is not None
    assert (mixture.logits.grad.abs().sum(1) > 0).all()
    for layer in layers.values():
        assert (layer.A.grad is not None) == trained
        assert layer.layer.weight.grad is None


def test_the_gradients_of_a_mixed_model_are_those_of_the_dense_one(vit_base: Path) -> None:
    layer = nn.Linear(6, 5).double().requires_grad_(False)
    parts = [
        Factors(random(2, 6, seed=1).detach(), random(5, 2, seed=2).detach(), 1.5, random(5, seed=3).detach()),
        Factors(random(3, 6, seed=4).detach(), random(5, 3, seed=5).detach(), 0.5),
        None,
    ]
    mixture = Mixture(["m"], [0.1, -0.4, 0.3], "matrix", True).double()
    mixed_layer = MixedLinear("m", layer, parts, mixture, True)
    x, logits = random(4, 6, seed=6), mixture.logits.detach().clone().requires_grad_()
    w = logits[0].softmax(0)
    delta = sum(w[i] * part.scaling * part.B @ part.A for i, part in enumerate(parts) if part)
    assert parts[0] is not None
    expected = x @ (layer.weight + delta).T + layer.bias + w[0] * 1.5 * parts[0].bias
    found = mixed_layer(x)
    torch.testing.assert_close(found, expected)
    g = random(4, 5, seed=7, requires_grad=False)
    torch.testing.assert_close(
        torch.autograd.grad(found, [x, mixture.logits], g), torch.autograd.grad(expected, [x, logits], g)
    )


class Scaled(nn.Embedding):
    """As BART's and Gemma 3's."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


OTHER_LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "embedding": (nn.Embedding(7, 5, padding_idx=0), torch.tensor([[0, 1, 6], [3, 3, 1]])),
    "scaled embedding": (Scaled(7, 5), torch.tensor([[0, 1, 6], [3, 3, 1]])),
    "conv1d": (nn.Conv1d(3, 5, 4, stride=3, padding=2), random(2, 3, 11, seed=8)),
    "conv2d": (nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(2, 0)), random(2, 3, 6, 7, seed=8)),
    "conv2d without a bias": (nn.Conv2d(3, 5, 2, stride=2, bias=False), random(2, 3, 6, 6, seed=8)),
    "conv2d of the same size": (nn.Conv2d(3, 5, 3, padding="same"), random(2, 3, 4, 5, seed=8)),
    "conv2d of one image": (nn.Conv2d(3, 5, 3, padding=1), random(3, 4, 5, seed=8)),
    "conv2d of kernel 1": (nn.Conv2d(3, 5, 1, dilation=2), random(2, 3, 4, 5, seed=8)),
    "conv2d that reflects": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), random(2, 3, 4, 5, seed=8)),
    "conv3d": (nn.Conv3d(2, 5, 2, stride=(1, 2, 1), padding=1), random(1, 2, 3, 4, 3, seed=8)),
}


def in_peft(layer: nn.Module, biased: bool, use_rslora: bool = False) -> tuple[nn.Module, Factors]:
    """A layer with a LoRA of PEFT's, and its factors."""
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["layer"], lora_bias=biased, use_rslora=use_rslora)
    model = get_peft_model(nn.ModuleDict({"layer": deepcopy(layer)}), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    shapes = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(model).items()}
    modules, _ = parse(AdapterHeader({"r": 3, "lora_alpha": 5, "use_rslora": use_rslora}, shapes))
    return model.base_model.model.layer, modules["layer"].factors(lambda key: get_peft_model_state_dict(model)[key])


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_an_embedding_or_convolution_is_what_peft_makes_of_it_with_its_gradients(name: str) -> None:
    layer, x = deepcopy(OTHER_LAYERS[name][0]).double().requires_grad_(False), OTHER_LAYERS[name][1]
    expected, part = in_peft(layer, biased=isinstance(layer, nn.Conv2d), use_rslora=True)
    kind = _mixed_type(layer)
    found = kind("m", layer, [part], Mixture(["m"], [0.0], "matrix", True), trained=True)
    torch.testing.assert_close(found(x), expected(x))
    g = random(*found(x).shape, seed=7, requires_grad=False)
    theirs = {key: value for key, value in expected.named_parameters() if value.requires_grad}
    factors = [next(value for key, value in theirs.items() if f"_{factor}." in key) for factor in "AB"]
    wanted = torch.autograd.grad(expected(x), factors, g)
    for own, reference in zip(torch.autograd.grad(found(x), [found.A, found.B], g), wanted, strict=True):
        torch.testing.assert_close(own, reference.reshape(own.shape))
    (back,) = found.parts(1)
    assert back is not None
    assert torch.equal(back.A, part.A)
    assert torch.equal(back.B, part.B)


@pytest.mark.parametrize("name", [name for name in OTHER_LAYERS if name != "conv2d that reflects"])
def test_several_experts_on_an_embedding_or_convolution_are_the_sum_of_dense_updates(name: str) -> None:
    layer, x = deepcopy(OTHER_LAYERS[name][0]).double().requires_grad_(False), OTHER_LAYERS[name][1]
    rows, d_in = (len(layer.weight), layer.weight[0].numel())
    d_out, d_in = (d_in, rows) if isinstance(layer, nn.Embedding) else (rows, d_in)
    bias = None if isinstance(layer, nn.Embedding) or layer.bias is None else random(d_out, seed=3).detach()
    parts = [
        Factors(random(2, d_in, seed=1).detach(), random(d_out, 2, seed=2).detach(), 1.5, bias),
        Factors(random(4, d_in, seed=4).detach(), random(d_out, 4, seed=5).detach(), 0.5),
        None,
    ]
    mixture = Mixture(["m"], [0.1, -0.4, 0.3], "matrix", True).double()
    found = _mixed_type(layer)("m", layer, parts, mixture, trained=True)(x)
    logits = mixture.logits.detach().clone().requires_grad_()
    w = logits[0].softmax(0)
    delta = sum(w[i] * part.scaling * part.B @ part.A for i, part in enumerate(parts) if part)
    changed = {"weight": layer.weight + (delta.T if isinstance(layer, nn.Embedding) else delta.view_as(layer.weight))}
    if bias is not None:
        changed["bias"] = layer.bias + w[0] * 1.5 * bias
    if isinstance(layer, nn.Embedding):
        layer.padding_idx = None  # autograd would leave the row out of the weights' gradients
    expected = functional_call(layer, changed, (x,))
    torch.testing.assert_close(found, expected)
    g = random(*found.shape, seed=7, requires_grad=False)
    ours, theirs = [mixture.logits], [logits]
    if x.requires_grad:
        ours, theirs = [*ours, x], [*theirs, x]
    torch.testing.assert_close(torch.autograd.grad(found, ours, g), torch.autograd.grad(expected, theirs, g))


def test_a_mixed_layer_tells_the_weight_and_bias_of_the_base() -> None:
    """T5 and CLIP ask for their dtype."""
    layer = nn.Linear(4, 3)
    part = Factors(torch.randn(2, 4), torch.randn(3, 2), 1.0)
    module = MixedLinear("m", layer, [part], Mixture(["m"], [0.0], "matrix", False), True)
    assert module.weight is layer.weight
    assert module.bias is layer.bias


@pytest.mark.parametrize("name", ["embedding", "conv2d"])
def test_under_autocast_an_embedding_or_convolution_stays_near_float32(name: str) -> None:
    layer, x = OTHER_LAYERS[name][0], OTHER_LAYERS[name][1]
    x = x.detach().float() if x.is_floating_point() else x
    _, part = in_peft(layer, biased=False)
    module = _mixed_type(layer)("m", layer, [part], Mixture(["m"], [0.0], "matrix", False), True)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
    assert relative_difference(found, module(x)) < 0.02
    found.float().sum().backward()
    assert module.A.grad is not None
    assert module.A.grad.dtype == torch.float32


def three_parts() -> list[Factors | None]:
    return [
        Factors(random(2, 6, seed=1).detach(), random(5, 2, seed=2).detach(), 1.5, random(5, seed=3).detach()),
        Factors(random(3, 6, seed=4).detach(), random(5, 3, seed=5).detach(), 0.5),
        None,
    ]


def dense_sum(x: Tensor, layer: nn.Linear, parts: Sequence[Factors | None], weights: Tensor) -> Tensor:
    """x (W0 + Σ diag(ω_n) s_n B_n A_n)ᵀ + b + Σ ω_n s_n b_n, written out; weights are (N) or (N × d_out)."""
    weight, bias = layer.weight, layer.bias
    for part, w in zip(parts, weights, strict=True):
        if part is not None:
            w = w.expand(len(bias))
            weight = weight + part.scaling * torch.diag(w) @ part.B @ part.A
            bias = bias if part.bias is None else bias + w * part.scaling * part.bias
    return x @ weight.T + bias


@pytest.mark.parametrize("kind", ["free", "channels"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_free_weights_and_those_of_outputs_are_the_dense_formula_with_its_gradients(kind: str, tokens: int) -> None:
    layer, parts, start = nn.Linear(6, 5).double().requires_grad_(False), three_parts(), [0.1, -0.4, 0.3]
    mixture: Mixture = (
        FreeMixture(["m", "wider"], start, "matrix", True)
        if kind == "free"
        else ChannelMixture({"m": 5, "wider": 9}, start, "matrix", True)
    ).double()
    module = MixedLinear("m", layer, parts, mixture, True)
    for weight, expected in zip(mixture("m"), torch.tensor(start).softmax(0).tolist(), strict=True):
        torch.testing.assert_close(weight.detach(), torch.full_like(weight, expected))
    with torch.no_grad():
        mixture.logits.copy_(random(*mixture.logits.shape, seed=8))
    weights = mixture("m").detach().clone().requires_grad_()
    x = random(tokens, 6, seed=6)
    found, expected = module(x), dense_sum(x, layer, parts, weights)
    torch.testing.assert_close(found, expected)
    g = random(tokens, 5, seed=7, requires_grad=False)
    of_x, of_logits = torch.autograd.grad(found, [x, mixture.logits], g, retain_graph=True)
    expected_x, expected_weights = torch.autograd.grad(expected, [x, weights], g)
    torch.testing.assert_close(of_x, expected_x)
    own = of_logits[mixture.group_of["m"]]
    torch.testing.assert_close(own if kind == "free" else own[:, :5], expected_weights)
    assert not of_logits[mixture.group_of["wider"]].any()
    if kind == "channels":
        assert not own[:, 5:].any()
    biases = torch.autograd.grad(found, module.biases, g)[0]
    scales = torch.tensor([1.5, 0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(biases, (weights.T * scales).T.detach().view(3, -1) * g.sum(0))


def test_parts_hold_the_weights_of_outputs() -> None:
    layer, parts = nn.Linear(6, 5).double(), three_parts()
    mixture = ChannelMixture({"m": 5}, [0.0, 0.0, 0.0], "matrix", True).double()
    with torch.no_grad():
        mixture.logits.copy_(random(*mixture.logits.shape, seed=8))
    module = MixedLinear("m", layer, parts, mixture, True)
    x, bare = random(3, 6, seed=6).detach(), nn.Linear(6, 5).double()
    bare.load_state_dict(layer.state_dict())
    expected = dense_sum(x, bare, module.parts(3), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(module(x).detach(), expected.detach())
    assert mixture.weights()["m"] == pytest.approx(mixture.logits[0].mean(1).tolist())


def test_a_switch_lets_one_answer_or_none() -> None:
    layer, parts = nn.Linear(6, 5).double().requires_grad_(False), three_parts()
    switch = Switch(["m"], 3).double()
    module, x = MixedLinear("m", layer, parts, switch, False), random(4, 6, seed=6).detach()
    torch.testing.assert_close(module(x), layer(x))
    for expert in range(3):
        switch.choose(expert)
        torch.testing.assert_close(module(x), dense_sum(x, layer, parts, torch.eye(3, dtype=torch.float64)[expert]))
    switch.choose(None)
    torch.testing.assert_close(module(x), layer(x))
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_under_autocast_a_layer_computes_in_sixteen_bits() -> None:
    layer = nn.Linear(16, 16)
    part = Factors(torch.randn(2, 16), torch.randn(16, 2), 1.0)
    module = MixedLinear("m", layer, [part], Mixture(["m"], [0.0], "matrix", False), True)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.bfloat16
    assert relative_difference(found, module(x)) < 0.02
    found.float().sum().backward()
    assert module.A.grad is not None
    assert module.A.grad.dtype == torch.float32


def test_factors_on_a_sixteen_bit_base_are_kept_in_float32(vit_base: Path) -> None:
    layer = nn.Linear(16, 16).to(torch.bfloat16)
    part = Factors(torch.randn(2, 16), torch.randn(16, 2), 1.0)
    module = MixedLinear("m", layer, [part], Mixture(["m"], [0.0], "matrix", False), True)
    (kept,) = module.parts(1)
    assert kept is not None
    assert torch.equal(kept.A, part.A)
    assert module(torch.randn(4, 16).to(torch.bfloat16)).dtype == torch.bfloat16


NAMES = ["enc.0.attn.q", "enc.0.attn.v", "enc.1.attn.q", "enc.1.mlp.0.up", "enc.10.attn.q", "embed"]


@pytest.mark.parametrize(
    ("granularity", "together"),
    [
        ("matrix", [{name} for name in NAMES]),
        ("layer", [{*NAMES[:2]}, {*NAMES[2:4]}, {NAMES[4]}, {NAMES[5]}]),
        ("role", [{NAMES[0], NAMES[2], NAMES[4]}, {NAMES[1]}, {NAMES[3]}, {NAMES[5]}]),
        ("global", [{*NAMES}]),
    ],
)
def test_modules_share_weights_by_granularity(granularity: str, together: list[set[str]]) -> None:
    groups = group_modules(NAMES, granularity)
    assert sorted(set(groups.values())) == list(range(len(together)))
    found = [{name for name in NAMES if groups[name] == number} for number in set(groups.values())]
    assert sorted(map(sorted, found)) == sorted(map(sorted, together))
    assert group_modules(NAMES[::-1], granularity) == groups


def test_weights_start_from_the_softmax_and_sum_to_one() -> None:
    mixture = Mixture(NAMES, [0.0, 1.0, -1.0], "layer", True)
    expected = torch.tensor([0.0, 1.0, -1.0]).softmax(0).tolist()
    assert all(weights == pytest.approx(expected) for weights in mixture.weights().values())
    assert mixture.logits.shape == (4, 3)


def test_modules_that_cannot_be_mixed_are_all_named(
    make_expert: MakeExpert, bert_base: Path, gpt2_base: Path, tmp_path: Path
) -> None:
    words = open_expert(make_expert(tmp_path / "words", bert_base, target_modules=["word_embeddings", "query"]))
    biased = open_expert(make_expert(tmp_path / "biased", bert_base, lora_bias=True))
    other = open_expert(make_expert(tmp_path / "other", gpt2_base))
    with pytest.raises(PimergeError) as caught:
        mixed(bert_base, [words, biased, other], [0.0, 0.0, 0.0])
    assert "'bert.embeddings.word_embeddings' is an embedding" in str(caught.value)
    assert "'transformer.h.0.attn.c_attn' of the base does not exist" in str(caught.value)


class Shifted(nn.Embedding):
    """Looks up other rows than it is given, as BART's and OPT's positions do."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2)


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.Conv2d(3, 4, 3, dilation=2), "is a Conv2d with dilation (2, 2)"),
        (nn.Conv1d(4, 4, 3, groups=2), "is a Conv1d of 2 groups"),
        (Shifted(7, 4), "is a Shifted"),
        (nn.ConvTranspose1d(3, 4, 3), "is a ConvTranspose1d"),
    ],
)
def test_layers_on_which_peft_adds_no_matrix_are_refused(layer: nn.Module, found: str) -> None:
    shape = (7, 4) if isinstance(layer, nn.Embedding) else (4, layer.weight[0].numel())
    component = LoraComponent("x", {"layer": lora_module(shape[1], shape[0])}, {})
    with pytest.raises(PimergeError) as caught:
        mix_lora(nn.ModuleDict({"layer": layer}), [component], Mixture(["layer"], [0.0], "matrix", False), False)
    assert f"module 'layer' of the base {found}" in str(caught.value)


def test_shapes_that_differ_from_the_base_are_named(vit_base: Path) -> None:
    expert_of = lambda d_in: LoraComponent(  # noqa: E731
        f"e{d_in}",
        {"classifier": lora_module(d_in)},
        {"classifier": Factors(torch.ones(1, d_in), torch.ones(2, 1), 1.0)},
    )
    mixture = Mixture(["classifier"], [0.0, 0.0], "matrix", False)
    with pytest.raises(PimergeError, match=r"module 'classifier' of 'e9' is 2 × 9, the base's \(2, 16\)"):
        mix_lora(model_for(vit_base), [expert_of(16), expert_of(9)], mixture, False)


def lora_module(d_in: int, d_out: int = 2) -> Any:
    prefix = "base_model.model.classifier.lora_"
    modules, _ = parse(AdapterHeader({"r": 1}, {f"{prefix}A.weight": (1, d_in), f"{prefix}B.weight": (d_out, 1)}))
    return modules["classifier"]
