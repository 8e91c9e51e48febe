"""What a merge says that it will do, before it does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.head import NO_HEAD, Head
from pimerge.adapters.low_rank import Truncation
from pimerge.merging.dry_run import UpdatePlan, plan_of
from pimerge.merging.method import METHODS, open_method
from pimerge.merging.preparation import prepare
from pimerge.merging.request import EntrySpace
from pimerge.merging.update_merge import UpdateMerge, UpdateSettings
from tests.support.experts import PREFIX, raw_expert, set_config, set_tensors, updates_of
from tests.support.numerics import normal

SHAPES = {"q": (7, 2, 5), "v": (6, 3, 9)}
NAMES = [name for name in METHODS.names() if name not in ("fisher", "regmean", "slerp")]


def make(folder: Path, seed: int = 0, shapes: dict[str, tuple[int, int, int]] = SHAPES, **config: Any) -> Expert:
    """An expert of random factors."""
    return open_expert(raw_expert(folder, updates_of(shapes, seed), **config))


def planned(
    experts: list[Expert], weights: list[float] | None = None, head: Head = NO_HEAD, **settings: Any
) -> UpdatePlan:
    """The plan of a uniform merge."""
    shares = weights or [1 / len(experts)] * len(experts)
    split = {"selected": settings.pop("selected")} if "selected" in settings else {}
    return plan_of(
        prepare(experts, shares, open_method("interpolated"), UpdateSettings(**settings), **split), experts, head
    )


@pytest.fixture
def a(tmp_path: Path) -> Expert:
    """A plain expert."""
    return make(tmp_path / "a")


def test_experts_of_one_form_need_no_words(a: Expert, tmp_path: Path) -> None:
    plan = planned([a, make(tmp_path / "b", 1)])
    assert (plan.modules, plan.handled, plan.left_out) == (2, [], [])


def test_rslora_beside_lora_is_said(a: Expert, tmp_path: Path) -> None:
    b = make(tmp_path / "b", 1, use_rslora=True, lora_alpha=2)
    handled = planned([a, b]).handled
    assert handled[0] == "rsLoRA (alpha / √r) in 'b', alpha / r in the others: each with its own scaling"
    assert not any("rsLoRA" in sentence for sentence in planned([b, b]).handled)


def test_ranks_scalings_and_dtypes_that_differ_are_said(a: Expert, tmp_path: Path) -> None:
    b = make(tmp_path / "b", 1, {"q": (7, 4, 5), "v": (6, 4, 9)})
    c = make(tmp_path / "c", 2, lora_alpha=12)
    half = {key: a.tensor(key).half() for key in a.file.entries}
    d = open_expert(set_tensors(make(tmp_path / "d").path, half))
    assert planned([a, b]).handled == ["different ranks: a 2/3, b 4"]
    assert planned([a, c]).handled == ["different scalings, from 1 to 6: each is part of its ΔW"]
    assert planned([a, d]).handled == ["different dtypes (F16, F32): the result has float32"]
    assert planned([a, d], dtype=torch.bfloat16).handled == ["different dtypes (F16, F32): the result has bfloat16"]


def test_a_module_of_one_expert_only_is_said(a: Expert, tmp_path: Path) -> None:
    b = make(tmp_path / "b", 1, {"q": (7, 2, 5)})
    sentence = planned([a, b]).handled[-1]
    assert sentence.startswith("1 modules are adapted by some of the experts only, such as 'v': the others count as")
    assert planned([a, b], selected=lambda name: name == "q").modules == 1


def test_an_expert_given_twice_is_said(a: Expert, tmp_path: Path) -> None:
    assert planned([a, a, a]).handled == ["'a' is given 3 times: its weights are added"]


def test_modules_that_are_not_selected_are_left_out(a: Expert) -> None:
    plan = planned([a], selected=lambda name: name == "q")
    assert plan.left_out == ["1 modules by --include and --exclude, such as 'v'"]


def test_experts_of_weight_0_are_left_out(a: Expert, tmp_path: Path) -> None:
    b = make(tmp_path / "b", 1)
    assert planned([a, b], [1.0, 0.0]).left_out == ["'b': weight 0 everywhere"]
    method = open_method("interpolated")
    some = prepare([a, b], {"q": [1.0, 0.0], "v": [1.0, 0.1]}, method)
    assert plan_of(some, [a, b], NO_HEAD).left_out == []


def test_heads_that_are_left_out_are_named(a: Expert, tmp_path: Path) -> None:
    folder = set_tensors(make(tmp_path / "b", 1).path, {f"{PREFIX}classifier.weight": normal(2, 9)})
    b = open_expert(set_config(folder, modules_to_save=["classifier"]))
    assert planned([a, b]).left_out == ["the heads of 'b': the result has none"]
    with_head = planned([a, b], head=Head(b.head_tensors(), ["classifier"], None))
    assert with_head.left_out == []
    assert with_head.size == planned([a, b]).size + 18 * 4


def test_biases_of_a_method_that_is_not_linear_are_said(tmp_path: Path) -> None:
    experts = biased(tmp_path)
    plans = {
        name: plan_of(prepare(experts, [0.5, 0.5], open_method(name)), experts, NO_HEAD) for name in ("ties", "uniform")
    }
    assert plans["ties"].handled == ["bias updates are summed with the weights"]
    assert plans["uniform"].handled == []


def biased(folder: Path) -> list[Expert]:
    """Two experts with a bias update in one of two modules."""
    return [
        open_expert(
            set_tensors(
                set_config(make(folder / f"biased{seed}", seed).path, lora_bias=True),
                {f"{PREFIX}{name}.lora_B.bias": normal(SHAPES[name][0]) for name in SHAPES},
            )
        )
        for seed in range(2)
    ]


def true_size(merge: UpdateMerge) -> int:
    """Bytes of what the merge gives."""
    total = 0
    for name in merge.names:
        factors = merge.module(name).factors
        tensors = [factors.A, factors.B] + ([] if factors.bias is None else [factors.bias])
        total += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    return total


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 1, 3, 99])
@pytest.mark.parametrize("name", NAMES)
def test_the_size_is_never_too_small(
    name: str, rank: int | None, dtype: torch.dtype | None, a: Expert, tmp_path: Path
) -> None:
    experts = [a, make(tmp_path / "b", 1), make(tmp_path / "c", 2)]
    for space in ("core", "delta") if open_method(name).space == "elementwise" else ("core",):
        settings = UpdateSettings(truncation=Truncation(rank), space=EntrySpace(space), dtype=dtype)
        merge = prepare(experts, [1 / 3] * 3, open_method(name), settings)
        size = plan_of(merge, experts, NO_HEAD).size
        assert size >= true_size(merge)
        if merge.method.space == "linear":
            assert size == true_size(merge)


def test_the_size_counts_biases(tmp_path: Path) -> None:
    experts = biased(tmp_path)
    merge = prepare(experts, [0.5, 0.5], open_method("uniform"))
    assert plan_of(merge, experts, NO_HEAD).size == true_size(merge)


def test_memory_grows_with_what_is_dense(tmp_path: Path) -> None:
    experts = [make(tmp_path / str(seed), seed, {"q": (200, 2, 300)}) for seed in range(2)]
    ties = open_method("ties")
    linear, core, delta = (
        plan_of(prepare(experts, [0.5, 0.5], method, UpdateSettings(space=EntrySpace(space))), experts, NO_HEAD).memory
        for method, space in ((open_method("uniform"), "core"), (ties, "core"), (ties, "delta"))
    )
    assert linear < core < delta
    assert delta > 2 * 200 * 300 * 4
