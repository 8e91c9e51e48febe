"""Laws that every tune method in the folder's listing keeps, on real training of tiny models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from PIL import ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn

from pimerge import peft_methods  # noqa: F401  PEFT has to know every kind
from pimerge.adapters.expert import Expert, open_expert
from pimerge.core.errors import PimergeError
from pimerge.core.files import sha256_file
from pimerge.core.manifest import Manifest
from pimerge.evaluation.scoring import Score, score_checkpoint, score_experts
from pimerge.tasks.task import open_task
from pimerge.tuning.components import chosen_experts
from pimerge.tuning.ensemble import ENSEMBLE_FILE, Ensemble, EnsembleDocument, open_ensemble
from pimerge.tuning.fit import fit
from pimerge.tuning.method import METHODS, TuneMethod, open_tune_method
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.run import manifest_of
from pimerge.tuning.session import TuneRequest, TuneResult, TuningSession, open_session
from tests.support.bases import model_for
from tests.support.experts import MakeExpert, dense_deltas
from tests.support.numerics import logits_of, relative_difference
from tests.support.tasks import write_image_task
from tests.support.tuning import tune

NAMES = METHODS.names()
OPTIONS = TrainingOptions(epochs=6, shots=12, lr=1e-2, batch_size=8, holdout=0.2)
Inputs = Mapping[str, Tensor]


@dataclass
class Pool:
    """Experts, their target, and the base that they are tried on one after the other."""

    session: TuningSession
    experts: list[Expert]
    target: Expert
    inputs: Inputs

    def request(self, options: TrainingOptions, run: Path, **fields: Any) -> TuneRequest:
        target = fields.pop("target", self.target)
        experts = fields.pop("experts", self.experts)
        return TuneRequest(self.session, experts, target, target or experts[0], None, options, run, **fields)

    def tune(self, method: str, output: Path, **fields: Any) -> TuneResult:
        """As a user does, from a base of its own."""
        return tune(method, self.session.task, self.session.base, self.experts, self.target, output, OPTIONS, **fields)


@dataclass
class Run:
    """One tuning: what is in the base, and what was written."""

    method: TuneMethod
    result: TuneResult
    output: Path
    before: float

    @property
    def is_expert(self) -> bool:
        return (self.output / "adapter_config.json").is_file()


@pytest.fixture(scope="module")
def pool(
    tmp_path_factory: pytest.TempPathFactory,
    make_expert: MakeExpert,
    vit_base: Path,
    scans: tuple[list[Any], list[int]],
) -> Pool:
    """Scans as they are or inverted: a task that even a head on random features learns."""
    folder = tmp_path_factory.mktemp("pool")
    pictures = [ImageOps.invert(image) if index % 2 else image for index, image in enumerate(scans[0][:60])]
    task = write_image_task(folder / "task", pictures, [index % 2 for index in range(60)], ["light", "dark"])
    x = open_expert(make_expert(folder / "x", vit_base, task, seed=1))
    a = open_expert(make_expert(folder / "a", vit_base, task, seed=2, r=2, lora_bias=True))
    b = open_expert(make_expert(folder / "b", vit_base, task, seed=3, target_modules=["q_proj", "projection"]))
    return Pool(open_session(open_task(task), x.base, "cpu"), [a, b.with_strength(0.5)], x, pixels())


def pixels(count: int = 8) -> dict[str, Tensor]:
    return {"pixel_values": torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def write(pool: Pool, method: TuneMethod, request: TuneRequest, result: TuneResult, output: Path) -> None:
    chosen = chosen_experts(method, request.experts, request.target)
    result.write(output, manifest_of(method, request, result, chosen), False)


@pytest.fixture(scope="module", params=NAMES)
def run(request: pytest.FixtureRequest, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One tuning by each method, on a base that the other methods were on before."""
    folder = tmp_path_factory.mktemp("out")
    method, output = open_tune_method(request.param), folder / "tuned"
    with pool.session.restored(OPTIONS.seed) as undo:
        request = pool.request(OPTIONS, folder / "run", undo=undo)
        before = loss_of(pool, pool.session.loaded.model)
        result = fit(method, request)
        write(pool, method, request, result, output)
        yield Run(method, result, output, before)


def loss_of(pool: Pool, model: nn.Module) -> float:
    """On what is trained on and held out."""
    task, loaded = pool.session.task, pool.session.loaded
    examples, _ = task.examples("train", loaded.processor, loaded.config, shots=12, seed=0)
    return float(task.type.nll(model.eval(), examples.batch(range(len(examples)))).mean())


def answers(output: Path, base: Path, inputs: Inputs) -> Tensor:
    """log p of the classes by what was written, read by PEFT or transformers."""
    if (output / ENSEMBLE_FILE).is_file():
        members = EnsembleDocument.model_validate_json((output / ENSEMBLE_FILE).read_text()).members
        return sum(m.weight * answers(output / m.path, base, inputs).exp() for m in members).log()  # type: ignore[union-attr]
    if (output / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(model_for(base), output).eval()
    else:
        images = "pixel_values" in inputs
        kind = "AutoModelForImageClassification" if images else "AutoModelForSequenceClassification"
        model = getattr(transformers, kind).from_pretrained(output).eval()
    return logits_of(model, inputs).log_softmax(-1)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; the hash of the request is left out, since ``write`` of this file knows none."""
    files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    return {name: re.sub(rb'"request": "\w*"', b"", text) for name, text in files.items()}


def test_what_was_written_answers_as_what_was_trained(run: Run, pool: Pool, vit_base: Path) -> None:
    expected = logits_of(run.result.model.eval(), pool.inputs).log_softmax(-1)
    torch.testing.assert_close(answers(run.output, vit_base, pool.inputs), expected, atol=1e-5, rtol=1e-5)


def test_eval_scores_it_as_what_was_trained(run: Run, pool: Pool) -> None:
    task, loaded = pool.session.task, pool.session.loaded
    examples, _ = task.examples("test", loaded.processor, loaded.config)
    scored = task.type.score(run.result.model.eval(), examples, range(len(examples)))
    found = score_of(run.output, pool)
    assert found.loss == pytest.approx(float(scored.losses.mean()), abs=1e-5)
    assert found.accuracy == sum(scored.right) / len(examples)


def score_of(output: Path, pool: Pool) -> Score:
    if (output / "config.json").is_file():
        return score_checkpoint(output, pool.session.task, device="cpu")
    opened: Expert | Ensemble
    opened = open_ensemble(output) if (output / ENSEMBLE_FILE).is_file() else open_expert(output)
    return score_experts([opened], pool.session.task, pool.session.base, None, device="cpu")[-1]


def test_of_the_base_only_the_head_changes_unless_all_of_it_trains(run: Run, pool: Pool, vit_base: Path) -> None:
    inside = {**dict(pool.session.loaded.model.named_parameters()), **dict(run.result.model.named_parameters())}
    frozen = {name: value for name, value in model_for(vit_base).named_parameters() if "classifier" not in name}
    found = {name.replace(".layer.weight", ".weight").replace(".layer.bias", ".bias"): p for name, p in inside.items()}
    changed = {name for name, value in frozen.items() if not torch.equal(found[name], value)}
    assert bool(changed) == run.method.plan.full


def test_the_loss_goes_down(run: Run, pool: Pool) -> None:
    """On the examples that it was trained on, the result is better than the bare base under a fresh head."""
    assert loss_of(pool, run.result.model) < run.before - 0.02
    assert run.result.outcome.train_loss is not None
    assert run.result.outcome.train_loss > 0


def test_as_many_parameters_train_as_it_says(run: Run) -> None:
    trained = sum(p.numel() for p in run.result.model.parameters() if p.requires_grad)
    if run.result.outcome.held_out_losses:
        assert run.result.outcome.trained_parameters == trained
    else:  # several trainings, or a search besides
        assert run.result.outcome.trained_parameters >= trained


def test_as_many_parameters_are_deployed_as_there_are_in_its_files(run: Run) -> None:
    stored = [tensor for file in run.output.rglob("*.safetensors") for tensor in load_file(file).values()]
    if run.is_expert:
        assert run.result.rank == max(open_expert(run.output).ranks, default=0)
    assert run.result.deployed_parameters == sum(tensor.numel() for tensor in stored)


def test_experts_that_are_not_trained_are_in_it_as_they_were(run: Run, pool: Pool) -> None:
    """By its coefficients the same update can be computed from the experts' own."""
    file = run.output / "coefficients.json"
    if not file.is_file():
        assert not run.is_expert or run.method.plan.random_experts or not run.method.plan.experts
        return
    document = json.loads(file.read_text())
    experts = [open_expert(run.output / path) for path in document["experts"]]
    assert [expert.sha256 for expert in experts] == document["sha256"]
    assert document["scales"] == run.result.scales
    updates = [dense_deltas(expert) for expert in experts]
    differences = []
    for name, delta in dense_deltas(open_expert(run.output)).items():
        shares = [w * scale for w, scale in zip(document["weights"][name], document["scales"], strict=True)]
        parts = [share * update[name] for share, update in zip(shares, updates, strict=True) if name in update]
        differences.append(relative_difference(delta, sum(parts, torch.zeros(()))))
    assert (max(differences) < 1e-5) != document["experts_trained"]


def test_the_manifest_names_every_file_with_its_hash(run: Run) -> None:
    manifest = Manifest.model_validate_json((run.output / "pimerge.json").read_text())
    assert manifest.options["method"] == run.method.name
    assert manifest.outputs.keys() == {f.name for f in run.output.iterdir() if f.is_file()} - {"pimerge.json"}
    for name, sha256 in manifest.outputs.items():
        assert sha256_file(run.output / name) == sha256


def test_it_lies_beside_its_task(run: Run, pool: Pool) -> None:
    for file in run.output.rglob("task.json"):
        assert open_task(file).sha256() == pool.session.task.sha256()
    assert (run.output / "task.json").is_file()


def test_what_was_written_has_a_head_and_its_experts_can_join_a_pool(run: Run, pool: Pool) -> None:
    head = {"classifier.weight", "classifier.bias"}
    folders = [file.parent for file in run.output.rglob("adapter_config.json")]
    if run.method.plan.full:
        assert not folders
        assert head <= load_file(run.output / "model.safetensors").keys()
    else:
        assert folders == [run.output] if run.is_expert else len(folders) > 1
    for expert in map(open_expert, folders):
        assert expert.head.keys() == head
        assert expert.base.identity == pool.target.base.identity


def test_alone_on_its_base_it_has_the_same_bytes(run: Run, pool: Pool) -> None:
    again = run.output.with_name("again")
    pool.tune(run.method.name, again)
    assert contents(again) == contents(run.output)
    assert [path.name for path in run.output.parent.iterdir() if path.name.startswith(".")] == []


def test_an_output_that_is_there_is_refused_and_kept(run: Run, pool: Pool) -> None:
    before = contents(run.output)
    with pytest.raises(PimergeError, match="--force"):
        pool.tune(run.method.name, run.output)
    assert contents(run.output) == before


def test_there_is_a_weight_for_each_expert(run: Run) -> None:
    assert bool(run.result.weights) != run.method.plan.full
    for weights in run.result.weights.values():
        assert len(weights) == len(run.result.experts) == len(run.result.scales)
        if run.method.plan.mixture not in ("free", "channels"):
            assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("name", [method.name for method in METHODS if method.plan.experts])
def test_a_method_that_composes_needs_experts(name: str, pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match=f"'{name}' needs experts to combine"):
        tune(name, pool.session.task, pool.session.base, [], pool.target, tmp_path / "tuned", OPTIONS)


QUICK = replace(OPTIONS, epochs=1, shots=3)
BASES = {"lora": "bert", "ia3": "vit", "prompt": "gpt2"}


@pytest.fixture(scope="module", params=BASES)
def kind(
    request: pytest.FixtureRequest,
    make_expert: MakeExpert,
    parity_task: Path,
    text_task: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Pool:
    """Experts of a kind, on a base that all tests of it use one after the other."""
    base: Path = request.getfixturevalue(f"{BASES[request.param]}_base")
    images = base.name in ("vit", "clip")
    task, folder = parity_task if images else text_task, tmp_path_factory.mktemp("kind")
    x, a, b = (
        open_expert(make_expert(folder / name, base, task, seed=seed, kind=request.param))
        for seed, name in enumerate("xab")
    )
    ids = torch.randint(4, 20, (4, 7), generator=torch.Generator().manual_seed(0))
    inputs = pixels() if images else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dtype = "bfloat16" if request.param == "lora" else "float32"
    return Pool(open_session(open_task(task), x.base, "cpu", dtype), [a, b], x, inputs)


def state(model: nn.Module) -> dict[str, Any]:
    """All of a model that a method could leave behind."""
    found: dict[str, Any] = {"": sorted(vars(model))}
    for name, module in model.named_modules():
        found[f"module {name}"] = (id(module), type(module), module.training, len(module._forward_hooks))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[name] = (id(tensor), tensor.dtype, tensor.requires_grad, tensor.grad, tensor.double().numpy().tobytes())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_for_every_kind_it_answers_as_what_was_trained_and_leaves_the_base_as_it_was(
    kind: Pool, name: str, tmp_path: Path
) -> None:
    session, method = kind.session, open_tune_method(name)
    before = state(session.loaded.model)
    # with the target's expert, or one other alone
    given: dict[str, Any] = {} if kind.target.kind == "ia3" else {"experts": kind.experts[:1], "target": None}
    refused = pytest.raises(PimergeError, match="scales the outputs of updates ΔW")
    with refused if kind.target.tensor_sets and method.plan.mixture == "channels" else nullcontext():
        with session.restored(1) as undo:
            request = kind.request(QUICK, tmp_path / "run", undo=undo, **given)
            result = fit(method, request)
            write(kind, method, request, result, tmp_path / "tuned")
            expected = logits_of(result.model.eval(), kind.inputs).log_softmax(-1)
        found = answers(tmp_path / "tuned", Path(session.base.source), kind.inputs)
        tolerance = 1e-5 if session.precision == torch.float32 else 0.02
        torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)
    assert state(session.loaded.model) == before
