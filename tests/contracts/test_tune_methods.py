"""Laws that every tune method in the folder's listing keeps, on real training of a tiny model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import ImageOps
from torch import Tensor, nn

from pimerge import composed, strategies
from pimerge.bench import Bench, Fitted
from pimerge.errors import PimergeError
from pimerge.expert import open_expert
from pimerge.export import task_of
from pimerge.task import open_task
from pimerge.training import Options
from pimerge.tune_methods import Plan
from pimerge.tuning import tune
from tests.conftest import MakeExpert, logits_of, model_for, untidied, write_image_task

METHODS = sorted(strategies.summaries("tune_methods"))
OPTIONS = Options(epochs=6, shots=12, lr=1e-2, batch_size=8)


@dataclass
class Run:
    """One tuning: the composed model before and after, and what was written."""

    plan: Plan
    output: Path
    result: Fitted | None = None
    model: nn.Module | None = None
    before: dict[str, Tensor] = field(default_factory=dict)

    @property
    def trained(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def changed(self) -> set[str]:
        """The parameters that training changed."""
        after = dict(self.trained.named_parameters())
        return {name for name, value in self.before.items() if not torch.equal(after[name], value)}


@dataclass
class Inputs:
    """What every run starts from."""

    folder: Path
    base: Path
    task: Path

    def tune(self, method: str, output: Path, **options: Any) -> Fitted:
        pool = [open_expert(self.folder / name) for name in ("a", "b")]
        target = open_expert(self.folder / "x")
        return tune(method, open_task(self.task), target.base, pool, target, output, OPTIONS, **options)


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory,
    make_expert: MakeExpert,
    vit_base: Path,
    scans: tuple[list[Any], list[int]],
) -> Inputs:
    """Scans as they are or inverted: a task that even a head on random features learns."""
    folder = tmp_path_factory.mktemp("pool")
    pictures = [ImageOps.invert(image) if index % 2 else image for index, image in enumerate(scans[0][:60])]
    task = write_image_task(folder / "task", pictures, [index % 2 for index in range(60)], ["light", "dark"])
    make_expert(folder / "x", vit_base, task, seed=1)
    make_expert(folder / "a", vit_base, task, seed=2, r=2, lora_bias=True)
    make_expert(folder / "b", vit_base, task, seed=3, target_modules=["q_proj", "projection"])
    return Inputs(folder, vit_base, task)


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One tuning by each method."""
    found = Run(strategies.load("tune_methods", request.param).PLAN, tmp_path_factory.mktemp("out") / "tuned")
    compose = composed.compose

    def spying(model: nn.Module, *rest: Any) -> Any:
        layers = compose(model, *rest)
        found.model = model
        found.before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        return layers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composed, "compose", spying)
        patch.setattr(Bench, "tidied", untidied)
        found.result = inputs.tune(request.param, found.output)
    return found


def pixels(count: int = 8) -> dict[str, Tensor]:
    return {"pixel_values": torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def test_only_the_parameters_of_the_plan_change(run: Run) -> None:
    ends = {"classifier.weight", "classifier.bias"}
    ends |= {"A", "B"} if run.plan.train_experts else set()
    ends |= {"biases"} if run.plan.train_experts and run.plan.experts else set()
    ends |= {"mixture.logits"} if run.plan.train_weights else set()
    expected = {name for name in run.before if name.endswith(tuple(ends))}
    assert expected >= {"classifier.weight", "classifier.bias"}
    changed = run.changed()
    assert changed <= expected
    assert {name.rpartition(".")[2] for name in changed} == {end.rpartition(".")[2] for end in ends}


def test_as_many_parameters_train_as_it_says(run: Run) -> None:
    assert run.result is not None
    parameters = dict(run.trained.named_parameters())
    assert run.result.outcome.trained_parameters == sum(p.numel() for p in parameters.values() if p.requires_grad)


def test_the_export_loads_with_peft_and_answers_as_the_trained_composition(run: Run, inputs: Inputs) -> None:
    exported = PeftModel.from_pretrained(model_for(inputs.base), run.output).eval()
    expected = logits_of(run.trained.eval(), pixels())
    torch.testing.assert_close(logits_of(exported, pixels()), expected, atol=1e-5, rtol=1e-5)


def test_the_loss_goes_down(run: Run, inputs: Inputs) -> None:
    """On the examples that it was trained on, the result is better than its start."""
    task = open_task(inputs.task)
    processor = task.type.load_processor(str(inputs.base), None)
    examples, _ = task.examples("train", processor, model_for(inputs.base).config, shots=12, seed=0)
    batch = examples.batch(range(len(examples)))
    after = float(task.type.nll(run.trained.eval(), batch).mean())
    trained = {name: parameter.detach().clone() for name, parameter in run.trained.named_parameters()}
    run.trained.load_state_dict(run.before, strict=False)
    before = float(task.type.nll(run.trained, batch).mean())
    run.trained.load_state_dict(trained, strict=False)
    assert after < before - 0.02
    assert run.result is not None
    assert run.result.outcome.train_loss > 0


def test_the_export_is_an_expert_with_head_and_task_that_can_join_a_pool(run: Run, inputs: Inputs) -> None:
    expert = open_expert(run.output)
    assert expert.head.keys() == {"classifier.weight", "classifier.bias"}
    task = task_of(expert)
    assert task is not None
    assert task.sha256() == open_task(inputs.task).sha256()
    assert expert.base.identity == open_expert(inputs.folder / "x").base.identity


def test_the_same_seed_gives_the_same_bytes(run: Run, inputs: Inputs, tmp_path: Path, request: Any) -> None:
    method = request.node.callspec.params["run"]
    again = run.output.with_name("again")
    inputs.tune(method, again)
    for file in sorted(run.output.iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    assert {file.name for file in again.iterdir()} == {file.name for file in run.output.iterdir()}


def test_nothing_is_left_beside_the_output(run: Run) -> None:
    assert [path.name for path in run.output.parent.iterdir() if path.name.startswith(".")] == []


def test_an_output_that_is_there_is_refused_and_kept(run: Run, inputs: Inputs, request: Any) -> None:
    method = request.node.callspec.params["run"]
    before = {file.name: file.read_bytes() for file in run.output.iterdir()}
    with pytest.raises(PimergeError, match="is there already"):
        inputs.tune(method, run.output)
    assert {file.name: file.read_bytes() for file in run.output.iterdir()} == before


def test_the_weights_are_one_per_expert_and_sum_to_one(run: Run) -> None:
    assert run.result is not None
    for weights in run.result.weights.values():
        assert len(weights) == len(run.result.experts)
        assert sum(weights) == pytest.approx(1)
