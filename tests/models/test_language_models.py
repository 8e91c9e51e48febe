"""Bases that answer in text, from Fisher to features, against the batch of one and plain calls of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
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
from pimerge.models.injection import injected
from pimerge.models.loading import Bases, load_base
from pimerge.tasks.task import Task, open_task
from tests.support.bases import LANGUAGE_MODELS, model_for
from tests.support.experts import MakeExpert, dense_deltas
from tests.support.numerics import relative_difference
from tests.support.references import what_enters
from tests.support.tasks import write_text_task

CPU = torch.device("cpu")
COUNT = 9
EVERYWHERE = {
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gpt2-lm": ["c_attn", "c_fc", "c_proj"],
    "llama-lm": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
    "qwen2-lm": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
}


@dataclass
class Case:
    """A base with an expert in every projection, and a task for it."""

    name: str
    base: Path
    expert: Expert
    task: Task

    def model(self, dtype: torch.dtype) -> Any:
        model = PeftModel.from_pretrained(model_for(self.base).to(dtype), self.expert.path).eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return model

    def examples(self, model: Any) -> Any:
        processor = self.task.type.load_processor(str(self.base), None)
        return self.task.examples("train", processor, model.config, limit=COUNT)[0]


@pytest.fixture(scope="module", params=LANGUAGE_MODELS)
def case(
    request: pytest.FixtureRequest,
    language_base: Callable[[str], Path],
    make_expert: MakeExpert,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    base, task = language_base(request.param), write_text_task(folder / "task", request.param)
    expert = make_expert(folder / "x", base, task, target_modules=EVERYWHERE[request.param])
    return Case(request.param, base, open_expert(expert), open_task(task))


def plain_nll(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """−log p(y|x) of one example, its answer's tokens picked one by one."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[0]
    answer = [(place, int(token)) for place, token in enumerate(batch["labels"][0]) if token != -100]
    return -torch.stack([logits[place].log_softmax(0)[token] for place, token in answer]).sum()


def test_fisher_is_that_of_the_batch_of_one(case: Case) -> None:
    model = case.model(torch.float64)
    examples = case.examples(model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for index in range(COUNT):
        gradients = torch.autograd.grad(plain_nll(model, examples.batch([index])), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            expected[name] += gradient.square() / COUNT
    found = diagonal_fisher(model, parameters, [[4, 0, 7, 1], [2, 3, 5, 6, 8]], examples.batch, case.task.type.nll)
    assert found.route == "rules", found.why_loop
    whole = float(torch.cat([value.flatten() for value in expected.values()]).norm())
    for name, value in expected.items():
        assert float((found.diagonal[name] - value).norm()) < 1e-9 * max(float(value.norm()), 1e-3 * whole), name


def test_what_enters_a_layer_is_counted_without_padding_in_encoder_and_decoder(case: Case) -> None:
    model = case.model(torch.float32)
    examples, nll = case.examples(model), case.task.type.nll
    layers = linear_layers(model, case.expert.modules)

    alone = what_enters(model, layers, examples, nll, [[index] for index in range(COUNT)])
    together = what_enters(model, layers, examples, nll, [list(range(COUNT))])
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        assert relative_difference(together[name], value) < 1e-4, name


def test_an_embedding_does_not_depend_on_the_batches_and_knows_sampled_labels(case: Case, tmp_path: Path) -> None:
    diagonals = {}
    for labels, tokens in (("true", 1), ("true", 1000), ("sampled", 1), ("sampled", 1000)):
        store = Store(tmp_path / f"{labels}-{tokens}.json")
        settings = EmbedSettings(labels=labels, max_examples=COUNT, shots=None, seed=0)
        outcome = embed_expert(case.expert, case.task, store, settings, Bases(CPU, torch.float32), EmbedOptions(tokens))
        assert outcome.fisher is not None
        assert outcome.fisher.route == "rules"
        diagonals[labels, tokens] = torch.cat([v.flatten() for _, v in sorted(outcome.fisher.diagonal.items())])
    for labels in ("true", "sampled"):
        assert relative_difference(diagonals[labels, 1], diagonals[labels, 1000]) < 1e-3
    assert relative_difference(diagonals["true", 1], diagonals["sampled", 1]) > 1e-3


def state_before_the_answer(case: Case, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The input of the output layer that predicts the first token of the answer, from the plain body."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        states = getattr(model, model.base_model_prefix)(**inputs) if case.name not in ("t5",) else None
        if states is None:
            hidden = model(**inputs, output_hidden_states=True).decoder_hidden_states[-1]
            return hidden[0, 0] * (model.config.d_model**-0.5 if model.config.tie_word_embeddings else 1.0)
    first = int((batch["labels"][0] != -100).nonzero()[0, 0])
    return states.last_hidden_state[0, first]


def test_vectors_and_answers_are_those_of_transformers(case: Case) -> None:
    identity = find_base(str(case.base), None, case.base)
    loaded = load_base(identity, case.task, CPU, torch.float32)
    assert (loaded.head, loaded.has_own_head) == ((), True)
    reader = FeatureReader(loaded, identity, case.task, Sampling(limit=COUNT))
    dense = model_for(case.base)
    with torch.no_grad():
        for name, delta in dense_deltas(case.expert).items():
            layer = dense.get_submodule(name)
            layer.weight += 0.5 * (delta.T if type(layer).__name__ == "Conv1D" else delta)
    sample = reader.features(case.expert)[0.5]
    for index in range(COUNT):
        expected = state_before_the_answer(case, dense, reader.examples.batch([index]))
        assert relative_difference(sample.vectors[index], expected) < 1e-4
        likelihoods = []
        for label in (0, 1):
            batch = reader.examples.collate([reader.examples.labelled(index, label)])
            with torch.no_grad():
                likelihoods.append(-float(plain_nll(dense, batch)))
        assert sample.logits is not None
        assert sample.logits[index].tolist() == pytest.approx(likelihoods, rel=1e-4)
    bare = reader.base_features()
    assert bare.logits is None
    assert relative_difference(bare.vectors, sample.vectors) > 1e-4
    losses = reader.with_losses(case.expert, {0.5: sample}, None)[0.5].losses
    picked = sample.logits.log_softmax(1)[torch.arange(COUNT), sample.labels]
    torch.testing.assert_close(losses, -picked)


def test_pefts_own_forward_is_the_experts(case: Case) -> None:
    identity = find_base(str(case.base), None, case.base)
    loaded = load_base(identity, case.task, CPU, torch.float32)
    with injected(case.expert, loaded) as model:
        examples = case.examples(model)
        found = case.task.type.nll(model, examples.batch([0, 1]))
    expected = case.model(torch.float32)
    torch.testing.assert_close(found, case.task.type.nll(expected, examples.batch([0, 1])))


def test_a_base_without_words_to_give_out_is_an_error(tmp_path: Path, llama_backbone: Path) -> None:
    task = open_task(write_text_task(tmp_path / "task", "llama-lm"))
    with pytest.raises(PimergeError, match=r"has no weights for lm_head\.weight, so it cannot answer in text"):
        load_base(find_base(str(llama_backbone), None, tmp_path), task, CPU, torch.float32)


@pytest.fixture
def llama_backbone(language_base: Callable[[str], Path], tmp_path: Path) -> Path:
    folder = tmp_path / "backbone"
    base = language_base("llama-lm")
    model_for(base).model.save_pretrained(folder)
    for file in base.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
