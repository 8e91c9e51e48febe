"""The Fisher of every kind of expert on every architecture that it goes into, against the batch of one in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from pimerge.adapters.expert import open_expert
from pimerge.embedding.embed_expert import factors_of
from pimerge.embedding.fisher import diagonal_fisher
from pimerge.tasks.examples import bucket_by_length
from pimerge.tasks.task import open_task
from tests.support.bases import LANGUAGE_MODELS, model_for
from tests.support.experts import KINDS, PROMPTS, MakeExpert
from tests.support.references import nll
from tests.support.tasks import write_text_task

COUNT = 5
CLASSIFIERS = ("bert", "vit", "clip", "gpt2")
NO_BIASES = ("t5", "llama-lm")
BY_LOOP = {("prompt", "gpt2")}
"""Where padding behind a prompt is told from text by nobody, which the check of the rules finds."""
PAIRS = [
    (kind, base)
    for kind in ("lora", *KINDS)
    for base in (*CLASSIFIERS, *LANGUAGE_MODELS)
    if not (kind in PROMPTS and base in ("vit", "clip")) and not (kind == "bitfit" and base in NO_BIASES)
]


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_it_is_the_mean_of_each_examples_squared_gradients(
    kind: str,
    name: str,
    request: pytest.FixtureRequest,
    language_base: Callable[[str], Path],
    make_expert: MakeExpert,
    tmp_path: Path,
) -> None:
    if name in LANGUAGE_MODELS:
        base, folder = language_base(name), write_text_task(tmp_path / "task", name)
    else:
        base = request.getfixturevalue(f"{name}_base")
        folder = request.getfixturevalue("parity_task" if name in ("vit", "clip") else "text_task")
    expert, task = open_expert(make_expert(tmp_path / "x", base, kind=kind)), open_task(folder)
    model = PeftModel.from_pretrained(model_for(base).double(), expert.path).double().eval()
    processor = task.type.load_processor(str(base), None)
    examples, _ = task.examples("train", processor, model.config, limit=COUNT)
    parameters = factors_of(expert, model)
    assert sorted(parameters) == expert.keys
    expected = {key: torch.zeros_like(parameter) for key, parameter in parameters.items()}
    for index in range(COUNT):
        loss = nll(model, examples.batch([index]))
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for key, gradient in zip(parameters, gradients, strict=True):
            expected[key] += 0 if gradient is None else gradient.square() / COUNT
    batches = bucket_by_length(examples.lengths, 60, padded=not expert.virtual_tokens)
    found = diagonal_fisher(model, parameters, batches, examples.batch, task.type.nll)
    assert found.route == ("loop" if (kind, name) in BY_LOOP else "rules"), found.why_loop
    whole = float(torch.cat([value.flatten() for value in expected.values()]).norm())
    assert whole > 0
    for key, value in expected.items():
        assert float((found.diagonal[key] - value).norm()) < 1e-9 * max(float(value.norm()), 1e-3 * whole), key
