"""What can be embedded, compared and summed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

import pimerge
from pimerge.adapters.compatibility import (
    check_expert,
    differing_form,
    init_cosine,
    require_alike,
    require_finite,
)
from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.shared_modules import require_shared_modules
from pimerge.core.errors import PimergeError
from tests.support.bases import save_base
from tests.support.experts import (
    PREFIX,
    MakeExpert,
    dense_deltas,
    layers_expert,
    raw_expert,
    set_config,
    set_tensors,
    updates_of,
)
from tests.support.numerics import normal

SHAPES = {"q": (3, 2, 4)}


def test_an_expert_with_task_and_base_is_fine(
    tmp_path: Path, vit_base: Path, parity_task: Path, make_expert: MakeExpert
) -> None:
    expert = open_expert(make_expert(tmp_path / "e", vit_base, parity_task))
    assert check_expert(expert).labels == ["even", "odd"]


def test_every_problem_of_an_expert_comes_at_once(tmp_path: Path) -> None:
    folder = raw_expert(tmp_path / "e", updates_of(SHAPES), base_model_name_or_path="./gone")
    set_tensors(folder, {PREFIX + "q.lora_A.weight": torch.full((2, 4), math.inf)})
    with pytest.raises(PimergeError) as caught:
        check_expert(open_expert(folder))
    named = ["task.json", "the base model './gone' does not exist", "q.lora_A.weight holds 8 values"]
    assert len(caught.value.problems) == len(named)
    assert all(name in problem.message for name, problem in zip(named, caught.value.problems, strict=True))


def test_shapes_that_differ_from_the_base_are_named(
    tmp_path: Path, vit_base: Path, parity_task: Path, make_expert: MakeExpert
) -> None:
    folder = make_expert(tmp_path / "e", vit_base, parity_task)
    name = next(iter(open_expert(folder).modules))
    set_tensors(folder, {f"{PREFIX}{name}.lora_A.weight": normal(4, 5)})
    with pytest.raises(PimergeError, match=rf"module '{name}': ΔW is \(16, 5\), but the base's weight is \(16, 16\)"):
        check_expert(open_expert(folder))


def test_the_same_base_in_two_folders_is_one_base_and_another_is_named(tmp_path: Path) -> None:
    first = save_base(tmp_path / "a" / "base", normal(2, 2))
    shutil.copytree(first, tmp_path / "b" / "base")
    save_base(tmp_path / "c" / "base", normal(2, 2, seed=1))
    experts = []
    for name in "abc":
        folder = raw_expert(tmp_path / name / f"expert_{name}", updates_of(SHAPES))
        experts.append(open_expert(set_config(folder, base_model_name_or_path="base")))
    require_alike(experts[:2])
    with pytest.raises(
        PimergeError, match="'expert_c' has the base 'base', 'expert_a' has the base 'base', which is another"
    ):
        require_alike(experts)


def test_each_module_that_differs_is_named(tmp_path: Path) -> None:
    shapes = {"q": (3, 2, 4), "k": (3, 2, 4), "v": (5, 1, 4)}
    first = open_expert(raw_expert(tmp_path / "first", updates_of(shapes)))
    second = open_expert(raw_expert(tmp_path / "second", updates_of({"q": (3, 1, 5), "v": (6, 1, 4), "k": (3, 4, 4)})))
    with pytest.raises(PimergeError) as caught:
        require_alike([first, second])
    assert [problem.message for problem in caught.value.problems] == [
        "module 'q': ΔW is 3 × 5 (linear) in 'second', 3 × 4 (linear) in 'first'",
        "module 'v': ΔW is 6 × 4 (linear) in 'second', 5 × 4 (linear) in 'first'",
    ]


def test_a_module_of_later_experts_is_compared_too(tmp_path: Path) -> None:
    shapes = [{"q": (3, 2, 4)}, {"v": (5, 1, 4)}, {"v": (6, 1, 4)}]
    experts = [open_expert(raw_expert(tmp_path / str(i), updates_of(shape))) for i, shape in enumerate(shapes)]
    with pytest.raises(PimergeError, match=r"6 × 4 .* in '2', 5 × 4 .* in '1'"):
        require_alike(experts)


def test_another_type_of_layer_or_kernel_is_another_module(tmp_path: Path) -> None:
    conv = open_expert(layers_expert(tmp_path / "conv", target_modules=["conv"]))
    A, B = normal(2, 12), normal(4, 2)
    same_size = raw_expert(tmp_path / "linear", {"conv": (A, B)}, base_model_name_or_path="org/layers")
    other_kernel = raw_expert(tmp_path / "kernel", {"conv": (A, B)}, base_model_name_or_path="org/layers")
    set_tensors(
        other_kernel,
        {PREFIX + "conv.lora_A.weight": A.reshape(2, 2, 2, 3), PREFIX + "conv.lora_B.weight": B.reshape(4, 2, 1, 1)},
    )
    for other in (same_size, other_kernel):
        with pytest.raises(PimergeError, match="module 'conv'"):
            require_alike([conv, open_expert(other)])


def test_nan_is_named_with_its_expert(tmp_path: Path) -> None:
    good = open_expert(raw_expert(tmp_path / "good", updates_of(SHAPES)))
    folder = raw_expert(tmp_path / "bad", updates_of(SHAPES))
    set_tensors(folder, {PREFIX + "q.lora_B.weight": torch.full((3, 2), math.nan)})
    require_finite([good])
    with pytest.raises(PimergeError, match=r"'bad': .*q\.lora_B\.weight holds 6 values"):
        require_finite([good, open_expert(folder)])


def test_the_cosine_of_the_inits_is_that_of_all_factors_A(tmp_path: Path) -> None:
    shapes = {"q": (3, 2, 40), "v": (5, 1, 40)}
    A = {seed: updates_of(shapes, seed) for seed in (0, 50)}
    near = {name: (a + 0.1 * normal(*a.shape, seed=9), b) for name, (a, b) in A[0].items()}
    experts = [
        open_expert(raw_expert(tmp_path / name, updates))
        for name, updates in (("first", A[0]), ("near", near), ("far", A[50]))
    ]

    def flat(updates: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        return torch.cat([updates[name][0].flatten() for name in sorted(updates)]).double()

    for other, updates in zip(experts, (A[0], near, A[50]), strict=True):
        cosine, least = init_cosine(experts[0], other)
        assert cosine == pytest.approx(float(torch.cosine_similarity(flat(A[0]), flat(updates), dim=0)), abs=1e-9)
        assert (cosine >= least) == (other is not experts[2])


def test_modules_and_ranks_decide_whether_factors_can_be_compared(tmp_path: Path) -> None:
    shapes = {"first": {"q": (3, 2, 4)}, "more": {"q": (3, 2, 4), "v": (3, 2, 4)}, "higher": {"q": (3, 3, 4)}}
    experts = {name: open_expert(raw_expert(tmp_path / name, updates_of(s))) for name, s in shapes.items()}
    assert differing_form(experts["first"], experts["first"]) == ""
    assert differing_form(experts["first"], experts["more"]) == "it adapts other modules than the target"
    assert differing_form(experts["first"], experts["higher"]) == "its rank is 3, but the target has rank 2"


def test_experts_that_share_no_module_are_refused_unless_others_connect_them(tmp_path: Path) -> None:
    parts = {"low": ["layers.0.q"], "high": ["layers.1.q"], "both": ["layers.0.q", "layers.1.q"]}
    opened = {
        name: open_expert(raw_expert(tmp_path / name, updates_of(dict.fromkeys(modules, (3, 2, 4)))))
        for name, modules in parts.items()
    }
    require_shared_modules([opened["low"], opened["high"], opened["both"]])
    require_shared_modules([opened["low"]])
    with pytest.raises(PimergeError, match=r"'high' and 'low' share no module.*'layers\.1\.q'.*'layers\.0\.q'"):
        require_shared_modules([opened["low"], opened["high"]])


@pytest.mark.parametrize("wrapper", ["_foo", "inner"])
def test_names_with_one_more_part_are_refused_also_if_another_module_is_shared(tmp_path: Path, wrapper: str) -> None:
    def saved(name: str, *modules: str) -> Expert:
        return open_expert(raw_expert(tmp_path / name, updates_of(dict.fromkeys(modules, (3, 2, 4)))))

    plain = saved("plain", "embed", "layers.0.attn.q", "layers.1.attn.q")
    wrapped = saved("wrapped", "embed", f"layers.0.{wrapper}.attn.q")
    with pytest.raises(PimergeError, match=rf"(?s)'wrapped' adapts .* where 'plain' adapts .*'{wrapper}' is the name"):
        require_shared_modules([plain, wrapped])
    require_shared_modules([plain, saved("more", "embed", "layers.2.attn.q", "layers.0.cross.q")])


def test_disjoint_experts_merge_on_request(tmp_path: Path) -> None:
    paths = [
        raw_expert(tmp_path / name, updates_of({name: (3, 2, 4)}), base_model_name_or_path="org/base") for name in "ab"
    ]
    with pytest.raises(PimergeError, match="--allow-disjoint"):
        pimerge.merge(paths, output=tmp_path / "out")
    pimerge.merge(paths, allow_disjoint=True, output=tmp_path / "out")
    found = dense_deltas(open_expert(tmp_path / "out"))
    for path in paths:
        for name, delta in dense_deltas(open_expert(path)).items():
            torch.testing.assert_close(found[name], delta / 2, rtol=1e-5, atol=1e-6)
