"""Bases that answer in text about images, from Fisher to features, against the batch of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from pimerge.adapters.expert import Expert, open_expert
from pimerge.checkpoints.base import find_base
from pimerge.core.errors import PimergeError
from pimerge.embedding.embed_expert import EmbedOptions, embed_expert
from pimerge.embedding.features import FeatureReader, Sampling
from pimerge.embedding.fisher import diagonal_fisher
from pimerge.embedding.input_grams import linear_layers
from pimerge.embedding.store import Store
from pimerge.embedding.store_schema import EmbedSettings
from pimerge.models.loading import Bases, load_base
from pimerge.tasks.task import Task, open_task
from tests.support.bases import IMAGE_TEXT_MODELS, model_for
from tests.support.experts import MakeExpert, dense_deltas
from tests.support.image_text_bases import image_text_tokenizer
from tests.support.numerics import relative_difference
from tests.support.references import what_enters
from tests.support.tasks import write_image_text_task

COUNT = 7
CPU = torch.device("cpu")
LINEAR = r".*\.(q_proj|k_proj|v_proj|out_proj|o_proj|fc1|fc2|qkv|proj|image_projection|linear_1|gate_proj|down_proj)"
TOLD = {"columns": {"label": "parity"}}


@dataclass
class Case:
    """A base with an expert, and a task for it."""

    base: Path
    expert: Expert
    task: Task

    def model(self, dtype: torch.dtype) -> Any:
        model = PeftModel.from_pretrained(model_for(self.base).to(dtype), self.expert.path).eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or "bottleneck_" in name)
        return model

    def examples(self, model: Any) -> Any:
        processor = self.task.type.load_processor(str(self.base), None)
        return self.task.examples("train", processor, model.config, limit=COUNT)[0]


CASES = {
    **{name: (name, "lora", {"target_modules": LINEAR}, {}) for name in IMAGE_TEXT_MODELS},
    "bottlenecks": ("florence2", "bottleneck", {}, {}),
    "without images": ("florence2", "lora", {"target_modules": LINEAR}, TOLD),
}
of_updates = pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[1] == "lora"], indirect=True)


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest,
    image_text_base: Callable[[str], Path],
    make_expert: MakeExpert,
    scans: tuple[list[Any], list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    name, kind, config, fields = CASES[request.param]
    folder, base = tmp_path_factory.mktemp(name), image_text_base(name)
    task = write_image_text_task(folder / "task", scans, **fields)
    expert = make_expert(folder / "x", base, task, kind=kind, **config)
    return Case(base, open_expert(expert), open_task(task))


def plain_nll(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """−log p(y|x) of one example, its answer's tokens picked one by one."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[0]
    answer = [(place, int(token)) for place, token in enumerate(batch["labels"][0]) if token != -100]
    return -torch.stack([logits[place].log_softmax(0)[token] for place, token in answer]).sum()


def test_fisher_is_that_of_the_batch_of_one_in_tower_projector_and_words(case: Case) -> None:
    model = case.model(torch.float64)
    examples = case.examples(model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for index in range(COUNT):
        loss = plain_nll(model, examples.batch([index]))
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            expected[name] += 0 if gradient is None else gradient.square() / COUNT
    found = diagonal_fisher(model, parameters, [[4, 0, 1], [2, 3, 5, 6]], examples.batch, case.task.type.nll)
    assert found.route == "rules", found.why_loop
    whole = float(torch.cat([value.flatten() for value in expected.values()]).norm())
    for name, value in expected.items():
        assert float((found.diagonal[name] - value).norm()) < 1e-9 * max(float(value.norm()), 1e-3 * whole), name
    sees = any(value.any() for name, value in expected.items() if ".vision_" in name)
    assert sees == ("image" in case.task.columns)


@of_updates
def test_what_enters_a_layer_is_counted_without_the_padding_of_words(case: Case) -> None:
    model = case.model(torch.float32)
    examples, nll = case.examples(model), case.task.type.nll
    layers = linear_layers(model, case.expert.modules)

    alone = what_enters(model, layers, examples, nll, [[index] for index in range(COUNT)])
    together = what_enters(model, layers, examples, nll, [list(range(COUNT))])
    assert alone.keys() == together.keys()
    with_gradient = {name.partition(".")[2] for name in alone if name.startswith("output.")}
    assert with_gradient == {name.partition(".")[2] for name in alone if name.startswith("input.")}
    for name, value in alone.items():
        assert relative_difference(together[name], value) < 1e-4, name


@of_updates
def test_vectors_and_answers_are_those_of_transformers(case: Case) -> None:
    identity = find_base(str(case.base), None, case.base)
    loaded = load_base(identity, case.task, CPU, torch.float32)
    reader = FeatureReader(loaded, identity, case.task, Sampling(limit=COUNT))
    dense = model_for(case.base)
    with torch.no_grad():
        for name, delta in dense_deltas(case.expert).items():
            dense.get_submodule(name).weight += 0.5 * delta
    sample = reader.features(case.expert)[0.5]
    assert sample.logits is not None
    for index in range(COUNT):
        batch = reader.examples.batch([index])
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            states = dense.model(**inputs).last_hidden_state[0]
        first = int((batch["labels"][0] > 2).nonzero()[0, 0])  # 2 begins a text
        assert relative_difference(sample.vectors[index], states[first]) < 1e-4
        for label in (0, 1):
            batch = reader.examples.collate([reader.examples.labelled(index, label)])
            with torch.no_grad():
                assert float(sample.logits[index, label]) == pytest.approx(-float(plain_nll(dense, batch)), rel=1e-4)


def test_images_of_several_sizes_are_embedded_one_by_one(
    tmp_path: Path,
    scans: tuple[list[Any], list[int]],
    make_expert: MakeExpert,
    image_text_base: Callable[[str], Path],
) -> None:
    base = image_text_base("idefics3")
    images = [image.resize((16, 16) if index % 3 else (40, 16)) for index, image in enumerate(scans[0])]
    task = write_image_text_task(tmp_path / "task", (images, scans[1]), 6)
    expert = make_expert(tmp_path / "x", base, task, target_modules=LINEAR)
    case = Case(base, open_expert(expert), open_task(task))
    model = case.model(torch.float32)
    examples, nll = case.examples(model), case.task.type.nll
    assert not examples.alike
    together = nll(model, examples.batch(range(6)))
    alone = [plain_nll(model, examples.batch([index])).item() for index in range(6)]
    assert together.tolist() == pytest.approx(alone, rel=1e-4)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = 0.0
    for index in range(6):
        gradients = torch.autograd.grad(plain_nll(model, examples.batch([index])), list(parameters.values()))
        expected += sum(float(gradient.square().sum()) for gradient in gradients) / 6
    store = Store(tmp_path / "embeddings.json")
    settings = EmbedSettings(labels="true", max_examples=6, shots=None, seed=0)
    outcome = embed_expert(case.expert, case.task, store, settings, Bases(CPU, torch.float32), EmbedOptions(1000))
    assert outcome.fisher is not None
    found = sum(float(value.sum()) for value in outcome.fisher.diagonal.values())
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_a_processor_that_needs_torchvision_says_so(tmp_path: Path, scans: tuple[list[Any], list[int]]) -> None:
    base = tmp_path / "qwen2-vl"
    tokenizer = image_text_tokenizer(60, wraps=False)
    tokenizer.save_pretrained(base)
    small = {"hidden_size": 16, "num_heads": 2, "depth": 1, "embed_dim": 16}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text |= {"hidden_size": 16, "intermediate_size": 32, "rope_parameters": rope}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=small)
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(base)
    transformers.Qwen2VLImageProcessorPil().save_pretrained(base)
    settings = json.loads((base / "preprocessor_config.json").read_text())
    (base / "preprocessor_config.json").write_text(json.dumps(settings | {"processor_class": "Qwen2VLProcessor"}))
    task = open_task(write_image_text_task(tmp_path / "task", scans, 4))
    with pytest.raises(PimergeError, match=r"it requires the Torchvision library(.|\n)*→ install torchvision"):
        load_base(find_base(str(base), None, tmp_path), task, CPU, torch.float32)
