"""Several experts in one model: against the dense formula, autograd's own gradients, and PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pimerge.composition import (
    GRANULARITIES,
    PLANS,
    ChannelMixture,
    ComposedLinear,
    FreeMixture,
    Member,
    Mixture,
    Switch,
    cheapest_plan,
    compose,
    composed_linear,
    group_modules,
)
from pimerge.errors import PimergeError
from pimerge.expert import Expert, open_expert
from pimerge.kinds.lora import Factors
from pimerge.model import set_head
from tests.conftest import MakeExpert, dense_deltas, logits_of, model_for, relative_difference

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
        return composed_linear(given["x"], given["scale"], given["A"], given["B"], weight, bias, plan)

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
    found, expected = composed_linear(*trained, weight, offset, plan), dense(*trained, weight, offset)
    torch.testing.assert_close(found, expected)
    g = random(*found.shape, seed=7, requires_grad=False)
    torch.testing.assert_close(torch.autograd.grad(found, trained, g), torch.autograd.grad(expected, trained, g))


@pytest.mark.parametrize("plan", PLANS)
def test_frozen_factors_get_no_gradient(plan: str) -> None:
    x, scale, A, B, weight, bias = operands((3,), 4, 5, 2)
    composed_linear(x, scale, A.detach(), B.detach(), weight, bias, plan).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None


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
    found = composed_linear(*rounded, plan)
    assert found.dtype == torch.bfloat16
    assert relative_difference(found, dense(*exact)) < 0.02


@pytest.mark.parametrize("plan", PLANS)
def test_an_update_far_below_the_bases_rounding_is_not_lost_in_bfloat16(plan: str) -> None:
    _, scale, A, B, _, bias = (value.detach() for value in operands((8,), 32, 32, 6))
    x = torch.eye(32, dtype=torch.float64)[:8] - torch.eye(32, dtype=torch.float64)[8:16]
    weight = torch.full((32, 32), 1024.0, dtype=torch.float64)  # x W0ᵀ is 0, and W0 + ΔW would round to W0
    exact = [x, 1e-2 * scale, A, B, weight, 0 * bias]
    found = composed_linear(*(value.to(torch.bfloat16) for value in exact), plan)
    assert relative_difference(found, dense(*exact)) < 0.02


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank": {"r": 2, "lora_alpha": 5},
    "rslora": {"use_rslora": True},
    "fewer": {"layers_to_transform": [1]},
    "bias": {"lora_bias": True},
}
MODULES = {"vit": ["v_proj", "o_proj"], "bert": ["value", "key"], "gpt2": ["c_fc", "c_proj"]}
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


def member_of(expert: Expert) -> Member:
    return Member(expert.name, expert.modules, {name: expert.factors(name) for name in expert.modules})


def composed(
    base: Path, experts: Sequence[Expert], start: Sequence[float], trained: bool = False
) -> tuple[nn.Module, dict[str, ComposedLinear]]:
    model = model_for(base)
    mixture = Mixture(sorted({name for expert in experts for name in expert.modules}), start, "matrix", True)
    return model, compose(model, [member_of(expert) for expert in experts], mixture, trained)


@pytest.mark.parametrize("name", [*CONFIGS, "modules"])
def test_one_expert_gives_pefts_own_logits(pool: tuple[Path, dict[str, Expert], Inputs], name: str) -> None:
    base, experts, inputs = pool
    expected = PeftModel.from_pretrained(model_for(base), experts[name].path).eval()
    model, _ = composed(base, [experts[name]], [0.0])
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
    model, _ = composed(base, experts, start)
    torch.testing.assert_close(logits_of(model, inputs), logits_of(expected, inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("trained", [False, True])
def test_parts_is_the_inverse_of_composing(pool: tuple[Path, dict[str, Expert], Inputs], trained: bool) -> None:
    base, named, _ = pool
    experts = list(named.values())
    _, layers = composed(base, experts, [0.0] * len(experts), trained)
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
    model, layers = composed(base, experts, [0.0] * len(experts), trained)
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


def test_the_gradients_of_a_composed_model_are_those_of_the_dense_one(vit_base: Path) -> None:
    layer = nn.Linear(6, 5).double().requires_grad_(False)
    parts = [
        Factors(random(2, 6, seed=1).detach(), random(5, 2, seed=2).detach(), 1.5, random(5, seed=3).detach()),
        Factors(random(3, 6, seed=4).detach(), random(5, 3, seed=5).detach(), 0.5),
        None,
    ]
    mixture = Mixture(["m"], [0.1, -0.4, 0.3], "matrix", True).double()
    composed_layer = ComposedLinear("m", layer, parts, mixture, True)
    x, logits = random(4, 6, seed=6), mixture.logits.detach().clone().requires_grad_()
    w = logits[0].softmax(0)
    delta = sum(w[i] * part.scaling * part.B @ part.A for i, part in enumerate(parts) if part)
    assert parts[0] is not None
    expected = x @ (layer.weight + delta).T + layer.bias + w[0] * 1.5 * parts[0].bias
    found = composed_layer(x)
    torch.testing.assert_close(found, expected)
    g = random(4, 5, seed=7, requires_grad=False)
    torch.testing.assert_close(
        torch.autograd.grad(found, [x, mixture.logits], g), torch.autograd.grad(expected, [x, logits], g)
    )


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
    module = ComposedLinear("m", layer, parts, mixture, True)
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
    module = ComposedLinear("m", layer, parts, mixture, True)
    x, bare = random(3, 6, seed=6).detach(), nn.Linear(6, 5).double()
    bare.load_state_dict(layer.state_dict())
    expected = dense_sum(x, bare, module.parts(3), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(module(x).detach(), expected.detach())
    assert mixture.weights()["m"] == pytest.approx(mixture.logits[0].mean(1).tolist())


def test_a_switch_lets_one_answer_or_none() -> None:
    layer, parts = nn.Linear(6, 5).double().requires_grad_(False), three_parts()
    switch = Switch(["m"], 3).double()
    module, x = ComposedLinear("m", layer, parts, switch, False), random(4, 6, seed=6).detach()
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
    module = ComposedLinear("m", layer, [part], Mixture(["m"], [0.0], "matrix", False), True)
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
    module = ComposedLinear("m", layer, [part], Mixture(["m"], [0.0], "matrix", False), True)
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


def test_an_unknown_granularity_lists_the_known() -> None:
    with pytest.raises(PimergeError, match=", ".join(GRANULARITIES)):
        group_modules(NAMES, "head")


def test_weights_start_from_the_softmax_and_sum_to_one() -> None:
    mixture = Mixture(NAMES, [0.0, 1.0, -1.0], "layer", True)
    expected = torch.tensor([0.0, 1.0, -1.0]).softmax(0).tolist()
    assert all(weights == pytest.approx(expected) for weights in mixture.weights().values())
    assert mixture.logits.shape == (4, 3)


def test_modules_that_cannot_be_composed_are_all_named(
    make_expert: MakeExpert, bert_base: Path, gpt2_base: Path, tmp_path: Path
) -> None:
    words = open_expert(make_expert(tmp_path / "words", bert_base, target_modules=["word_embeddings", "query"]))
    other = open_expert(make_expert(tmp_path / "other", gpt2_base))
    with pytest.raises(PimergeError) as caught:
        composed(bert_base, [words, other], [0.0, 0.0])
    assert "'bert.embeddings.word_embeddings' of the base is a Embedding" in str(caught.value)
    assert "'transformer.h.0.attn.c_attn' of the base is not there" in str(caught.value)


def test_shapes_that_differ_from_the_base_are_named(vit_base: Path) -> None:
    expert_of = lambda d_in: Member(  # noqa: E731
        f"e{d_in}",
        {"classifier": lora_module(d_in)},
        {"classifier": Factors(torch.ones(1, d_in), torch.ones(2, 1), 1.0)},
    )
    mixture = Mixture(["classifier"], [0.0, 0.0], "matrix", False)
    with pytest.raises(PimergeError, match=r"module 'classifier' of 'e9' is 2 × 9, the base's \(2, 16\)"):
        compose(model_for(vit_base), [expert_of(16), expert_of(9)], mixture, False)


def lora_module(d_in: int) -> Any:
    from pimerge.kinds.lora import parse

    prefix = "base_model.model.classifier.lora_"
    modules, _ = parse({"r": 1}, {f"{prefix}A.weight": (1, d_in), f"{prefix}B.weight": (2, 1)})
    return modules["classifier"]
