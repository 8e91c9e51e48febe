"""A head from a probe: against the probe itself on features of a plain forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pimerge.checkpoints.base import find_base
from pimerge.models.linear_probe import fit_probe
from pimerge.models.loaded_base import LoadedBase
from pimerge.models.loading import load_base
from pimerge.tasks.examples import Examples
from pimerge.tasks.task import Task, open_task
from pimerge.tuning.probe_head import fit_head, put_probe

CPU = torch.device("cpu")


def loaded_with(base: Path, task: Path) -> tuple[LoadedBase, Task, Examples, Tensor]:
    opened = open_task(task)
    loaded = load_base(find_base(str(base), None, base), opened, CPU, torch.float32)
    examples, labels = opened.examples("train", loaded.processor, loaded.config, shots=6)
    return loaded, opened, examples, torch.tensor(labels)


def inputs_of(layer: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What a layer takes in, one example after the other, by a hook of our own."""
    found: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return found[0]


@pytest.mark.parametrize(("base", "task"), [("vit_base", "parity_task"), ("bert_base", "text_task")])
def test_the_model_answers_as_the_probe_of_its_features(base: str, task: str, request: Any) -> None:
    loaded, opened, examples, labels = loaded_with(request.getfixturevalue(base), request.getfixturevalue(task))
    assert fit_head(loaded, loaded.model, opened, examples) is not None
    vectors, answers = [], []
    for index in range(len(examples)):
        batch = {name: value for name, value in examples.batch([index]).items() if name != "labels"}
        vectors.append(inputs_of(loaded.model.classifier, loaded.model, batch)[0])
        with torch.no_grad():
            answers.append(loaded.model(**batch).logits[0].log_softmax(0))
    features = torch.stack(vectors).double()
    expected = fit_probe(features, labels, 2, 0.1).log_probabilities(features)
    torch.testing.assert_close(torch.stack(answers).double(), expected, atol=1e-4, rtol=1e-4)


def test_a_causal_models_head_without_a_bias_reads_the_last_token(gpt2_base: Path, text_task: Path) -> None:
    loaded, opened, examples, labels = loaded_with(gpt2_base, text_task)
    assert loaded.model.score.bias is None
    assert fit_head(loaded, loaded.model, opened, examples) is not None
    batch = examples.batch(range(len(examples)))
    given = {name: value for name, value in batch.items() if name != "labels"}
    states = inputs_of(loaded.model.score, loaded.model, given)
    last = given["attention_mask"].cumsum(1).argmax(1)
    features = states[torch.arange(len(last)), last].double()
    expected = fit_probe(features, labels, 2, 0.1).log_probabilities(features)
    with torch.no_grad():
        found = loaded.model(**given).logits.double().log_softmax(1)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert float((found.exp() - expected.exp()).abs().max()) < 0.05


def test_a_layer_of_other_classes_is_not_touched(bert_base: Path, text_task: Path) -> None:
    loaded, opened, examples, _ = loaded_with(bert_base, text_task)
    loaded.model.classifier = nn.Linear(loaded.model.classifier.in_features, 5)
    before = loaded.model.classifier.weight.clone()
    assert fit_head(loaded, loaded.model, opened, examples) is None
    assert torch.equal(loaded.model.classifier.weight, before)


def test_put_probe_is_exact_with_a_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    probe = fit_probe(x, torch.arange(20) % 3, 3, 0.1)
    layer = nn.Linear(6, 3).double()
    put_probe(layer, probe)
    torch.testing.assert_close(layer(x).log_softmax(1), probe.log_probabilities(x))
