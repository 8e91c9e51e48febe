"""Answers in text about images, against plain calls of the processor and the model, one example and token at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Image
from transformers import AutoProcessor

from pimerge.core.errors import PimergeError
from pimerge.tasks.task import open_task
from pimerge.tasks.types import image_text_to_text
from tests.support.bases import END, IMAGE_TEXT_MODELS, model_for
from tests.support.tasks import write_image_text_task

Base = Callable[[str], Path]
Scans = tuple[list[Any], list[int]]
LABELS = ["dog", "cat"]
TOLD = {"columns": {"label": "parity"}}
FREE = {"labels": None, "columns": {"image": "scan"}, "answer": "{{ name }}", "max_new_tokens": 4}
CHAT = (
    "{% for turn in messages %}{{ turn.role }}: {% for part in turn.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% if turn.role == 'assistant' %}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass
class Case:
    """A model in float64, its processor, and a task's examples."""

    name: str
    model: Any
    processor: Any
    rows: Any
    examples: Any
    shows: bool

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row as the base's processor has it."""
        text = f"the {row['words']}:"
        if not self.shows:
            return dict(self.processor.tokenizer(text, return_tensors="pt"))
        if self.name in ("llava", "idefics3"):
            text = "<image>\n" + text
        image = row["scan"].convert("RGB")
        return dict(self.processor(text=[text], images=[image], return_tensors="pt"))

    def answer(self, text: str) -> list[int]:
        """An answer with its end, in tokens."""
        if self.name == "florence2":
            return list(self.processor.tokenizer(text)["input_ids"])
        return [*self.processor.tokenizer(" " + text)["input_ids"], END]

    def logits(self, inputs: dict[str, Any], written: list[int]) -> torch.Tensor:
        """Of the token behind what is written."""
        inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        more = torch.tensor([written], dtype=torch.int64)
        with torch.no_grad():
            if self.name == "florence2":
                decoder = torch.cat([torch.tensor([[END]]), more], 1)
                return self.model(**inputs, decoder_input_ids=decoder).logits[0, -1]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if self.name == "paligemma":  # a prompt is read in both directions, an answer is not
                prompt = torch.zeros(1, inputs["input_ids"].shape[1] - len(written), dtype=torch.int64)
                inputs["token_type_ids"] = torch.cat([prompt, torch.ones_like(more)], 1)
                inputs.pop("labels", None)
            return self.model(**inputs).logits[0, -1]

    def nll(self, row: dict[str, Any], answer: str) -> float:
        """−log p(answer|image, prompt), a forward pass for each token of the answer."""
        inputs, tokens = self.read(row), self.answer(answer)
        return -sum(
            float(self.logits(inputs, tokens[:place]).log_softmax(0)[token]) for place, token in enumerate(tokens)
        )


def make_case(base: Base, name: str, folder: Path, scans: Scans, **fields: Any) -> Case:
    task = open_task(write_image_text_task(folder, scans, **fields))
    model = model_for(base(name)).double()
    processor = image_text_to_text.load_processor(str(base(name)), None)
    rows, _ = task.rows("test")
    examples, _ = task.examples("test", processor, model.config)
    return Case(name, model, AutoProcessor.from_pretrained(base(name)), rows, examples, "image" in task.columns)


@pytest.fixture(scope="module", params=[(name, shows) for name in IMAGE_TEXT_MODELS for shows in (True, False)])
def case(
    request: pytest.FixtureRequest, image_text_base: Base, scans: Scans, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    name, shows = request.param
    return make_case(image_text_base, name, tmp_path_factory.mktemp("task"), scans, **({} if shows else TOLD))


def test_nll_is_the_sum_over_the_answers_tokens_and_its_end(case: Case) -> None:
    found = image_text_to_text.nll(case.model, case.examples.batch(range(12)))
    expected = [case.nll(row, LABELS[row["parity"]]) for row in case.rows]
    assert found.tolist() == pytest.approx(expected, rel=1e-7)
    assert len(set(case.examples.lengths)) > 2
    alone = torch.cat([image_text_to_text.nll(case.model, case.examples.batch([index])) for index in range(12)])
    torch.testing.assert_close(found, alone, rtol=1e-7, atol=1e-7)


def test_an_image_tells_something(case: Case) -> None:
    """Two scans under the same prompt."""
    same = [index for index, row in enumerate(case.rows) if row["words"] == ""]
    first, second = (case.nll({**case.rows[index], "words": ""}, "dog") for index in same[:2])
    assert (abs(first - second) > 1e-9) == case.shows


def test_the_likeliest_class_is_the_answer(case: Case) -> None:
    order = [7, 2, 9, 0]
    found = image_text_to_text.score(case.model, case.examples, order)
    table = [[case.nll(case.rows[index], label) for label in LABELS] for index in order]
    expected = [min(range(2), key=row.__getitem__) for row in table]
    assert found.chosen == expected
    true = [row[case.rows[index]["parity"]] for row, index in zip(table, order, strict=True)]
    assert found.losses.tolist() == pytest.approx(true, rel=1e-7)


@pytest.mark.parametrize("name", IMAGE_TEXT_MODELS)
def test_what_is_generated_is_the_likeliest_token_after_token(
    image_text_base: Base, name: str, scans: Scans, tmp_path: Path
) -> None:
    case = make_case(image_text_base, name, tmp_path / "task", scans, **FREE)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (parameter for parameter in case.model.parameters() if parameter.dim() == 2):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    expected = []
    for row in case.rows:
        written: list[int] = []
        while len(written) < 4 and END not in written:
            written.append(int(case.logits(case.read(row), written).argmax()))
        expected.append(case.processor.tokenizer.decode(written, skip_special_tokens=True).strip())
    assert len(set(expected)) > 1
    assert image_text_to_text.score(case.model, case.examples, list(range(12))).texts == expected


def test_a_chat_shows_the_image_where_the_template_does(image_text_base: Base, scans: Scans, tmp_path: Path) -> None:
    task = open_task(write_image_text_task(tmp_path / "task", scans, chat=True))
    base = image_text_base("llava")
    processor, config = image_text_to_text.load_processor(str(base), None), model_for(base).config
    with pytest.raises(PimergeError, match="no chat template"):
        task.examples("test", processor, config)
    processor.chat_template = CHAT
    rows, _ = task.rows("test")
    examples, _ = task.examples("test", processor, config)
    text = f"user: <image>the {rows[1]['words']}:assistant: "
    plain = AutoProcessor.from_pretrained(base)
    expected = plain(text=[text], images=[rows[1]["scan"].convert("RGB")], return_tensors="pt")["input_ids"][0]
    answer = plain.tokenizer("dog" if rows[1]["parity"] == 0 else "cat")["input_ids"]
    found = examples.batch([1])
    assert found["input_ids"][0].tolist() == [*expected.tolist(), *answer]
    assert found["labels"][0, -1] == plain.tokenizer.convert_tokens_to_ids("<|im_end|>")
    florence = image_text_base("florence2")
    with pytest.raises(PimergeError, match="'chat' is for causal models"):
        task.examples("test", image_text_to_text.load_processor(str(florence), None), model_for(florence).config)


@pytest.mark.parametrize("name", ["florence2", "llava"])
def test_a_prompt_that_is_too_long_keeps_its_image(
    image_text_base: Base, name: str, scans: Scans, tmp_path: Path
) -> None:
    prompt = "{% for i in range(60) %}cat {% endfor %}dog"
    case = make_case(image_text_base, name, tmp_path / "task", scans, prompt=prompt)
    image = case.processor.image_token_id
    pieces = 17 if name == "florence2" else 4
    assert case.examples.truncated == 12
    whole = case.processor.tokenizer("cat " * 60 + "dog", add_special_tokens=False)["input_ids"]
    if name == "florence2":
        assert case.examples.batch([0])["input_ids"][0].tolist() == [image] * 17 + [2] + whole[: 48 - 19] + [END]
    else:
        found = case.examples.batch([0])
        assert found["input_ids"].shape == (1, 40 - 1)
        assert found["input_ids"][0].tolist() == [image] * pieces + whole[-34:] + found["input_ids"][0, -1:].tolist()
    long = {"verbalizer": {"dog": "dog", "cat": "cat " * (38 if name == "llava" else 50)}}
    match = "image, and there is room for 1" if name == "llava" else r"the answer has 52 tokens .*room for 48"
    with pytest.raises(PimergeError, match=match):
        make_case(image_text_base, name, tmp_path / "task", scans, prompt=prompt, **long)


def broken(folder: Path, scans: Scans, **fields: Any) -> Path:
    """The task with an image in row 3 of the test split that is none."""
    write_image_text_task(folder, scans, **fields)
    path = str(folder / "test.parquet")
    rows = Dataset.from_parquet(path).cast_column("scan", Image(decode=False)).to_dict()
    rows["scan"][3] = {"bytes": b"\x89PNG no image", "path": None}
    Dataset.from_dict(rows).cast_column("scan", Image()).to_parquet(path)
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"row 3 \(from 0\) of the test split 'test' of .*the image cannot be decoded"),
        ({"columns": {"image": "words", "label": "parity"}, "prompt": "?"}, "12 problems.*there is no image '.*/dog'"),
        ({"columns": {"image": "parity", "label": "parity"}, "prompt": "?"}, "12 problems.*holds no image, but 0"),
        ({"columns": {"image": "picture", "label": "parity"}}, "has no column 'picture' for the image"),
        ({"prompt": "{{ scan }}?"}, "the prompt names the column 'scan', which holds the image"),
        ({"prompt": "{{ word }}?"}, "has no column 'word', which a template names"),
        ({"prompt": "<CAPTION> of"}, "does not take the prompt: Task token <CAPTION> should be the only content"),
        (
            {**TOLD, "prompt": "<image>?"},
            "12 problems.*the prompt has a place for an image, <image>, and the task shows",
        ),
        ({**TOLD, "prompt": None}, "there is no prompt"),
    ],
)
def test_bad_input_is_an_error_with_its_row(
    image_text_base: Base, scans: Scans, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    base = image_text_base("florence2")
    with pytest.raises(PimergeError, match=f"(?s){message}"):
        open_task(broken(tmp_path / "task", scans, **fields)).examples(
            "test", image_text_to_text.load_processor(str(base), None), model_for(base).config
        )


def test_a_missing_image_is_an_error(image_text_base: Base, scans: Scans, tmp_path: Path) -> None:
    folder = write_image_text_task(tmp_path / "task", scans)
    path = str(folder / "test.parquet")
    rows = Dataset.from_parquet(path)
    table = rows.to_dict()
    table["scan"][5] = None
    Dataset.from_dict(table, features=rows.features).to_parquet(path)
    with pytest.raises(PimergeError, match="has no image in 1 row"):
        open_task(folder).rows("test")


def test_a_base_without_a_processor_for_both_is_no_base(bert_base: Path) -> None:
    with pytest.raises(ValueError, match="no processor for images and texts"):
        image_text_to_text.load_processor(str(bert_base), None)


def test_an_image_that_is_processed_again_is_the_same(
    image_text_base: Base, scans: Scans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(image_text_base, "florence2", tmp_path / "task", scans)
    monkeypatch.setattr("pimerge.tasks.types._images._KEPT_BYTES", 0)
    again = make_case(image_text_base, "florence2", tmp_path / "task", scans)
    for index in (0, 5, 5):
        first, second = case.examples.batch([index]), again.examples.batch([index])
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_task_json_says_what_it_is(scans: Scans, tmp_path: Path) -> None:
    document = json.loads((write_image_text_task(tmp_path, scans) / "task.json").read_text())
    assert open_task(tmp_path).metrics == ["accuracy"]
    assert document["columns"]["image"] == "scan"
