"""Starts, options and exports of tunings on open experts.

What holds for every method stands in ``contracts/test_tune_methods.py``, resuming in ``integration/test_resume.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from pimerge.adapters.compatibility import init_cosine
from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.writer import Coefficients
from pimerge.core.errors import PimergeError
from pimerge.models.loaded_base import LoadedBase
from pimerge.tasks.task import Task, open_task
from pimerge.tuning import mixed_expert, trainer
from pimerge.tuning.method import METHODS
from pimerge.tuning.mixture import Mixture
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.run import TuneInputs, run_tuning
from pimerge.tuning.session import TuneResult, TuningSession
from tests.support.bases import model_for
from tests.support.cli import Interrupt, interrupted_after
from tests.support.experts import MakeExpert, dense_deltas
from tests.support.merging import merge
from tests.support.mixtures import mixture, save_adapter
from tests.support.numerics import logits_of, relative_difference
from tests.support.tuning import tune, unrestored

QUICK = TrainingOptions(epochs=2, shots=6, batch_size=8)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, vit_base: Path, parity_task: Path) -> Path:
    """x, a and b on images, each of another rank; not to be changed."""
    folder = tmp_path_factory.mktemp("tuning")
    for rank, name in enumerate(("x", "a", "b"), 2):
        make_expert(folder / name, vit_base, parity_task, seed=rank, r=rank)
    return folder


class Tuner:
    """Tunes on the pool's experts; what is not given is as in most tests."""

    def __init__(self, pool: Path, task: Task) -> None:
        self.x, self.a, self.b = (open_expert(pool / name) for name in ("x", "a", "b"))
        self.task = task

    def __call__(
        self,
        method: str,
        output: Path,
        options: TrainingOptions = QUICK,
        experts: Sequence[Expert] | None = None,
        target: Expert | None = None,
        **rest: Any,
    ) -> TuneResult:
        chosen = [self.a, self.b] if experts is None else experts
        return tune(method, self.task, self.x.base, chosen, target, output, options, **rest)


@pytest.fixture
def tuner(pool: Path, parity_task: Path) -> Tuner:
    return Tuner(pool, open_task(parity_task))


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Module, dict[str, list[float]]]]:
    """The model and the mixture's weights of each run when training begins."""
    found = []
    mix_lora = mixed_expert.mix_lora

    def spying(model: nn.Module, members: Any, mixture: Mixture, trained: bool) -> Any:
        layers = mix_lora(model, members, mixture, trained)
        found.append((model, mixture.weights()))
        return layers

    monkeypatch.setattr(mixed_expert, "mix_lora", spying)
    monkeypatch.setattr(TuningSession, "restored", unrestored)
    return found


def softmax(numbers: Sequence[float]) -> list[float]:
    weights: list[float] = torch.tensor(numbers, dtype=torch.float64).softmax(0).tolist()
    return weights


def start_of(tuner: Tuner, starts: list[Any], method: str, output: Path, **rest: Any) -> list[float]:
    """The weights that training begins with, the same for every module; it is stopped there."""
    with pytest.raises(Interrupt):
        tuner(method, output, track=interrupted_after(0), **rest)
    weights = list(starts[0][1].values())
    assert all(other == weights[0] for other in weights)
    first: list[float] = weights[0]
    return first


@pytest.mark.parametrize("scores", [[0.9, 0.1], [0.1, 0.9], [-1.0, -0.5]])
def test_learned_weights_start_from_the_softmax_of_the_scores(
    tuner: Tuner, starts: list[Any], tmp_path: Path, scores: list[float]
) -> None:
    found = start_of(tuner, starts, "learned", tmp_path / "tuned", scores=scores)
    assert found == pytest.approx(softmax(scores))


def test_interpolated_weights_give_the_target_its_share_and_the_others_the_softmax(
    tuner: Tuner, starts: list[Any], tmp_path: Path
) -> None:
    found = start_of(tuner, starts, "interpolated", tmp_path / "tuned", target=tuner.x, scores=[0.9, 0.1])
    assert found == pytest.approx([1 / 3, *(2 / 3 * share for share in softmax([0.9, 0.1]))])


@pytest.mark.parametrize("scores", [None, [None, None], [0.9, None]])
def test_without_all_scores_the_weights_start_equal(
    tuner: Tuner, starts: list[Any], tmp_path: Path, scores: list[float | None] | None
) -> None:
    assert start_of(tuner, starts, "learned", tmp_path / "tuned", scores=scores) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("method", "width", "rate"),
    [
        ("guided", 768, 2.5e-3),
        ("guided", 48, 5e-3),
        ("guided", None, 5e-3),
        ("interpolated", 768, 1e-3),
        ("learned", 768, 5e-3),
        ("full", 1000, 5e-5),
        ("full", 50, 1e-3),
    ],
)
def test_the_usual_learning_rate_goes_by_the_width_of_the_base(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, width: int | None, rate: float
) -> None:
    monkeypatch.setattr(LoadedBase, "width", width)
    tuner(method, tmp_path / "tuned", replace(QUICK, epochs=1))
    assert json.loads((tmp_path / "tuned" / "pimerge.json").read_text())["options"]["lr"] == pytest.approx(rate)


def test_uniform_weights_stay_equal_whatever_the_scores(tuner: Tuner, tmp_path: Path) -> None:
    result = tuner("uniform", tmp_path / "tuned", scores=[0.9, 0.1])
    assert all(weights == pytest.approx([0.5, 0.5], abs=1e-7) for weights in result.weights.values())


@pytest.mark.parametrize(("granularity", "groups"), [("matrix", 4), ("layer", 2), ("global", 1)])
def test_weights_are_shared_by_granularity(tuner: Tuner, tmp_path: Path, granularity: str, groups: int) -> None:
    options = replace(QUICK, granularity=granularity, weights_lr=0.3)
    weights = tuner("learned", tmp_path / "tuned", options).weights
    assert len({tuple(values) for values in weights.values()}) == groups


def test_interpolated_starts_from_the_targets_head(tuner: Tuner, starts: list[Any], tmp_path: Path) -> None:
    tuner("interpolated", tmp_path / "tuned", replace(QUICK, lr=1e-12, weight_decay=0.0), target=tuner.x)
    head = open_expert(tmp_path / "tuned").head_tensors()
    for name, value in tuner.x.head_tensors().items():
        torch.testing.assert_close(head[name], value, atol=1e-6, rtol=0)


def test_the_coefficients_of_learned_give_its_update_again(tuner: Tuner, tmp_path: Path) -> None:
    output = tmp_path / "tuned"
    result = tuner("learned", output, replace(QUICK, weights_lr=0.3))
    document = Coefficients.model_validate_json((output / "coefficients.json").read_text())
    assert document.weights == result.weights
    assert not document.experts_trained
    experts = [open_expert(output / path) for path in document.experts]
    assert [expert.sha256 for expert in experts] == document.sha256
    found = dense_deltas(open_expert(output))
    a, b = (dense_deltas(expert) for expert in experts)
    merged = {m.module.name: m.factors for m in merge(experts, document.weights)}
    for name, (w_a, w_b) in document.weights.items():
        expected = w_a * a[name] + w_b * b[name]
        assert relative_difference(found[name], expected) < 1e-5
        assert relative_difference(merged[name].B.double() @ merged[name].A.double(), expected) < 1e-5
        assert w_a != pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("method", ["uniform", "learned", "interpolated"])
def test_experts_are_mixed_at_their_scales(tuner: Tuner, starts: list[Any], tmp_path: Path, method: str) -> None:
    output = tmp_path / "tuned"
    frozen = replace(QUICK, lr=1e-12, weights_lr=1e-12, weight_decay=0.0)
    scaled = [tuner.a.with_strength(0.5), tuner.b.with_strength(0.25)]
    result = tuner(method, output, frozen, scaled, target=tuner.x if method == "interpolated" else None)
    document = Coefficients.model_validate_json((output / "coefficients.json").read_text())
    members = [tuner.x, tuner.a, tuner.b] if method == "interpolated" else [tuner.a, tuner.b]
    expected = [1.0, 0.5, 0.25][-len(members) :]
    assert result.scales == document.scales == expected
    assert json.loads((output / "pimerge.json").read_text())["options"]["scales"] == expected
    dense = [dense_deltas(expert) for expert in members]
    for name, delta in dense_deltas(open_expert(output)).items():
        shares = [weight * scale for weight, scale in zip(result.weights[name], expected, strict=True)]
        wanted = sum((share * deltas[name] for share, deltas in zip(shares, dense, strict=True)), torch.zeros(()))
        assert relative_difference(delta, wanted) < 1e-5


def test_a_rank_keeps_the_largest_singular_values(tuner: Tuner, tmp_path: Path) -> None:
    tuner("interpolated", tmp_path / "whole", target=tuner.x)
    whole = dense_deltas(open_expert(tmp_path / "whole"))
    for rank in (1, 50):
        result = tuner("interpolated", tmp_path / str(rank), replace(QUICK, rank=rank), target=tuner.x)
        cut = dense_deltas(open_expert(tmp_path / str(rank)))
        energy = lost = 0.0
        for name, delta in whole.items():
            left, singular, right = torch.linalg.svd(delta, full_matrices=False)
            assert relative_difference(cut[name], (left[:, :rank] * singular[:rank]) @ right[:rank]) < 1e-5
            energy += float(singular.square().sum())
            lost += float(singular[rank:].square().sum())
        assert result.rank == min(rank, 2 + 3 + 4)
        assert result.truncation == pytest.approx((lost / energy) ** 0.5, abs=1e-6)


def test_two_scratch_experts_of_one_init_seed_have_factors_of_one_init(tuner: Tuner, tmp_path: Path) -> None:
    barely = replace(QUICK, lr=1e-7, fresh_rank=4, fresh_modules=("q_proj", "v_proj"))
    experts = []
    for name, init_seed, seed in (("a", 3, 0), ("b", 3, 1), ("c", 4, 0)):
        tuner("scratch", tmp_path / name, replace(barely, init_seed=init_seed, seed=seed), [])
        experts.append(open_expert(tmp_path / name))
    first, second, other = experts
    for module in first.modules:
        A = first.factors(module).A
        torch.testing.assert_close(second.factors(module).A, A, atol=1e-5, rtol=0)
        assert relative_difference(other.factors(module).A, A) > 0.5
        assert A.shape == (4, 16)
    assert init_cosine(first, second)[0] > 0.99
    assert init_cosine(first, other)[0] < init_cosine(first, other)[1]


def test_a_fresh_expert_is_pefts_own_init(tuner: Tuner, vit_base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    options = replace(QUICK, lr=1e-12, weight_decay=0.0, fresh_rank=3, fresh_alpha=6, fresh_modules=("q_proj",))
    tuner("scratch", tmp_path / "tuned", replace(options, init_seed=5), [])
    base = model_for(vit_base)
    torch.manual_seed(5)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"]))
    expert = open_expert(tmp_path / "tuned")
    assert len(expert.modules) == 2
    for module in expert.modules:
        own = model.get_parameter(f"base_model.model.{module}.lora_A.default.weight")
        torch.testing.assert_close(expert.factors(module).A, own.detach(), atol=1e-6, rtol=0)


def test_a_fresh_expert_takes_rank_alpha_and_modules_from_the_targets(tuner: Tuner, tmp_path: Path) -> None:
    tuner("scratch", tmp_path / "tuned", experts=[], target=tuner.b)
    expert = open_expert(tmp_path / "tuned")
    assert expert.modules.keys() == tuner.b.modules.keys()
    assert expert.ranks == tuner.b.ranks


def test_a_fresh_expert_takes_its_form_from_another_where_the_target_has_none(tuner: Tuner, tmp_path: Path) -> None:
    tuner("scratch", tmp_path / "tuned", experts=[], like=tuner.a.with_strength(0.5), instead_of="learned")
    expert = open_expert(tmp_path / "tuned")
    assert (expert.modules.keys(), expert.ranks) == (tuner.a.modules.keys(), tuner.a.ranks)
    options = json.loads((tmp_path / "tuned" / "pimerge.json").read_text())["options"]
    assert (options["method"], options["instead_of"]) == ("scratch", "learned")


def test_modules_that_are_not_there_are_named(tuner: Tuner, tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match=r"no modules to adapt in ViT.*\n.*--modules"):
        tuner("scratch", tmp_path / "tuned", replace(QUICK, fresh_modules=("nowhere",)), [])


def test_interpolated_without_a_targets_expert_takes_a_fresh_one(
    tuner: Tuner, starts: list[Any], tmp_path: Path
) -> None:
    said: list[str] = []
    result = tuner("interpolated", tmp_path / "tuned", scores=[0.4, 0.4], note=said.append)
    assert result.experts == ["fresh", "a", "b"]
    assert all(weights == pytest.approx([1 / 3] * 3) for weights in starts[0][1].values())
    assert any("a fresh one takes its place" in sentence for sentence in said)
    assert not (tmp_path / "tuned" / "coefficients.json").exists()
    exported = PeftModel.from_pretrained(model_for(Path(tuner.x.base.source)), tmp_path / "tuned").eval()
    pixels = {"pixel_values": torch.rand(4, 3, 16, 16)}
    torch.testing.assert_close(
        logits_of(exported, pixels), logits_of(starts[0][0].eval(), pixels), atol=1e-5, rtol=1e-5
    )


def test_the_target_counts_once_though_it_is_among_the_experts(tuner: Tuner, tmp_path: Path) -> None:
    result = tuner("interpolated", tmp_path / "tuned", experts=[tuner.a, tuner.x], target=tuner.x)
    assert result.experts == ["x", "a"]


WRONG = {
    "epochs": 0,
    "lr": -1.0,
    "weights_lr": float("nan"),
    "batch_size": 0,
    "patience": 0,
    "holdout": 1.0,
    "label_smoothing": -0.1,
    "rank": 0,
    "fresh_rank": 0,
    "fresh_alpha": float("inf"),
    "shots": 0,
    "granularity": "head",
}


def test_all_wrong_options_come_at_once(tuner: Tuner, tmp_path: Path) -> None:
    with pytest.raises(PimergeError) as caught:
        tuner("learned", tmp_path / "tuned", TrainingOptions(**WRONG))
    for name, value in WRONG.items():
        assert f"--{name.replace('_', '-')} must be " in str(caught.value)
        assert f"got {value}" in str(caught.value)


def test_a_learning_rate_that_overflows_is_no_learning_rate(tuner: Tuner, tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match=r"--lr must be above 0 and at most 1e\+06; got 1e\+38"):
        tuner("learned", tmp_path / "tuned", replace(QUICK, lr=1e38))


def test_more_shots_than_there_are_name_each_class(tuner: Tuner, tmp_path: Path) -> None:
    with pytest.raises(PimergeError) as caught:
        tuner("learned", tmp_path / "tuned", replace(QUICK, shots=1000))
    assert "'even' (75)" in str(caught.value)
    assert "'odd' (75)" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        replace(QUICK, epochs=0.4),
        replace(QUICK, holdout=0.0),
        replace(QUICK, shots=1),
        replace(QUICK, batch_size=1000),
        replace(QUICK, epochs=1, label_smoothing=0.0, patience=1),
    ],
)
def test_odd_but_right_options_train(tuner: Tuner, tmp_path: Path, options: TrainingOptions) -> None:
    result = tuner("learned", tmp_path / "tuned", options)
    assert result.outcome.epochs == pytest.approx(options.epochs, abs=0.2)
    assert (result.outcome.held_out_loss is None) == (options.holdout == 0 or options.shots == 1)


def test_a_run_that_diverges_says_so(tuner: Tuner, tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match="--lr"):
        tuner("interpolated", tmp_path / "tuned", replace(QUICK, lr=1e6, epochs=4), target=tuner.x)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("holdout", [0.0, 0.5])
def test_a_loss_that_is_no_number_is_a_divergence_though_what_was_trained_is_one(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holdout: float
) -> None:
    monkeypatch.setattr(trainer, "mean_loss", lambda output, *_, **__: output.logits.sum() * 0 + float("inf"))
    with pytest.raises(PimergeError, match="diverged: NaN or Inf in the loss"):
        tuner("uniform", tmp_path / "tuned", replace(QUICK, holdout=holdout))
    assert list(tmp_path.iterdir()) == []


def test_other_dtypes_train_and_export_in_float32(tuner: Tuner, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16", "float64"):
        tuner("interpolated", tmp_path / dtype, target=tuner.x, dtype=dtype)
    expected = dense_deltas(open_expert(tmp_path / "float32"))
    for dtype, tolerance in (("bfloat16", 0.1), ("float64", 1e-4)):
        found = open_expert(tmp_path / dtype)
        assert found.dtypes == ("F32",)
        for name, delta in dense_deltas(found).items():
            assert relative_difference(delta, expected[name]) < tolerance


@pytest.mark.parametrize("base", ["bert", "gpt2"])
def test_texts_train_too_and_the_export_answers_as_the_composition(
    request: pytest.FixtureRequest,
    make_expert: MakeExpert,
    text_task: Path,
    starts: list[Any],
    tmp_path: Path,
    base: str,
) -> None:
    folder: Path = request.getfixturevalue(f"{base}_base")
    experts = [open_expert(make_expert(tmp_path / str(n), folder, text_task, seed=n)) for n in range(2)]
    task = open_task(text_task)
    tune("interpolated", task, experts[0].base, experts[1:], experts[0], tmp_path / "tuned", QUICK)
    ids = torch.randint(4, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    ids[0, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    exported = PeftModel.from_pretrained(model_for(folder), tmp_path / "tuned").eval()
    trained: nn.Module = starts[0][0].eval()
    torch.testing.assert_close(logits_of(exported, batch), logits_of(trained, batch), atol=1e-5, rtol=1e-5)


def test_experts_of_another_base_are_refused(
    tuner: Tuner, make_expert: MakeExpert, bert_base: Path, tmp_path: Path
) -> None:
    other = open_expert(make_expert(tmp_path / "other", bert_base))
    with pytest.raises(PimergeError, match="another model"):
        tuner("learned", tmp_path / "tuned", experts=[tuner.a, other])


def test_what_experts_saved_besides_a_head_is_not_lost_in_silence(
    make_expert: MakeExpert, vit_base: Path, parity_task: Path, tuner: Tuner, tmp_path: Path
) -> None:
    saved = ["classifier", "layernorm_before"]
    other = open_expert(make_expert(tmp_path / "other", vit_base, parity_task, modules_to_save=saved))
    with pytest.raises(PimergeError, match=r"'other' has trained .*layernorm_before of the base \(modules_to_save\)"):
        tuner("learned", tmp_path / "tuned", experts=[tuner.a, other])


def test_updates_of_bare_parameters_are_refused_before_the_base_is_loaded(tmp_path: Path) -> None:
    save_adapter(mixture("mixtral"), tmp_path / "a", 1, target_modules=[], target_parameters=["experts.down_proj"])
    nothing: Any = None
    experts = [open_expert(tmp_path / "a")]
    inputs = TuneInputs(method=METHODS.load("uniform"), task=nothing, base=nothing, experts=experts)
    with pytest.raises(PimergeError, match=r"only updates of layers can be tuned\n.*pimerge merge"):
        run_tuning(inputs, tmp_path / "out")
