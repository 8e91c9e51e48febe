"""The road with every kind of expert, each on another base; what comes out is loaded by PEFT alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from pimerge.adapters.expert import open_expert
from pimerge.checkpoints.base import find_base
from pimerge.models.injection import injected
from pimerge.models.loading import load_base
from pimerge.tasks.task import open_task
from pimerge.tasks.types._generation import generate
from pimerge.tasks.types._text_examples import TextExamples
from tests.support.bases import LANGUAGE_MODELS, model_for
from tests.support.cli import Shell
from tests.support.experts import KINDS, MakeExpert
from tests.support.references import nll
from tests.support.tasks import write_text_task

PAIRS = [("ia3", "vit"), ("bottleneck", "clip"), ("prefix", "t5"), ("prompt", "gpt2")]
NO_BIASES = ("bitfit", "t5")
CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_it_is_trained_embedded_ranked_merged_tuned_and_scored(
    kind: str,
    name: str,
    request: pytest.FixtureRequest,
    language_base: Callable[[str], Path],
    shell: Shell,
    tmp_path: Path,
) -> None:
    if name in LANGUAGE_MODELS:
        base, task = language_base(name), write_text_task(tmp_path / "tasks" / "animal", name)
    else:
        base = request.getfixturevalue(f"{name}_base")
        task = request.getfixturevalue("parity_task" if name in ("vit", "clip") else "text_task")
    scratch = f"tune --method scratch --kind {kind} --target {task} --base {base} --epochs 1 --shots 4"
    for line in (
        f"{scratch} --output experts/a",
        f"{scratch} --seed 1 --output experts/b",
        "embed experts",
        "rank --target a --measure fisher --no-gate",
        "merge --method uniform",
        "tune --method interpolated --epochs 1 --shots 4",
    ):
        result = shell(*line.split())
        assert result.code == 0, (line, result.err)
    scored = shell("eval", "merged", "tuned", "--json")
    assert scored.code == 0, scored.err
    losses = {row["name"]: row["loss"] for row in scored.document["scores"]}
    kind_of = open_task(task).type
    for out in ("merged", "tuned"):
        assert open_expert(tmp_path / out).kind == kind.replace("_", "-")
        model = PeftModel.from_pretrained(model_for(base), tmp_path / out).eval()
        processor = kind_of.load_processor(str(base), None)
        examples, _ = open_task(task).examples("test", processor, model.config)
        with torch.no_grad():
            found = [float(nll(model, examples.batch([index]))) for index in range(len(examples))]
        assert losses[out] == pytest.approx(sum(found) / len(found), rel=1e-4)


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in KINDS for n in ("t5", "gpt2-lm") if (k, n) != NO_BIASES])
def test_what_is_written_in_a_batch_is_what_peft_writes_to_each_prompt_alone(
    language_base: Callable[[str], Path], make_expert: MakeExpert, kind: str, name: str, tmp_path: Path
) -> None:
    free = {"labels": None, "columns": {}, "answer": "{{ words }}", "max_new_tokens": 5}
    folder, count = write_text_task(tmp_path / "task", name, 6, **free), 6
    expert = open_expert(make_expert(tmp_path / "x", language_base(name), kind=kind))
    base, task = find_base(str(language_base(name)), None, tmp_path), open_task(folder)
    loaded = load_base(base, task, CPU, torch.float32)
    examples, _ = task.examples("test", loaded.processor, loaded.config)
    assert isinstance(examples, TextExamples)
    assert examples.writing is not None
    with injected(expert, loaded) as model:
        words, _ = generate(model, examples.writing, range(count))
    plain = PeftModel.from_pretrained(model_for(language_base(name)), tmp_path / "x").eval()
    for index, found in enumerate(words):
        prompt = torch.tensor([examples.tokens[index].prompt])
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        written = plain.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)[0]
        answer = written[1:] if name == "t5" else written[prompt.shape[1] :]
        assert found == loaded.processor.decode(answer, skip_special_tokens=True).strip(), index
