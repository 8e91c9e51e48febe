"""Answers in text against plain calls of tokenizer and model, one example and one token at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoTokenizer

from pimerge.core.errors import PimergeError
from pimerge.tasks.examples import Examples
from pimerge.tasks.task import open_task
from tests.support.bases import END, LANGUAGE_MODELS, model_for
from tests.support.tasks import write_text_task

Base = Callable[[str], Path]
LABELS = ["dog", "cat"]
CHAT = (
    "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{% if turn.role == 'assistant' %}<|im_end|>\n"
    "{% else %}?{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass
class Case:
    """A model in float64, its tokenizer, and a task's examples."""

    name: str
    model: Any
    tokenizer: Any
    type: Any
    rows: list[dict[str, Any]]
    examples: Any
    labels: list[int]

    def encoded(self, row: dict[str, Any], answer: str) -> tuple[list[int], list[int]]:
        """Prompt and answer in tokens, as one would do it by hand."""
        prompt = self.tokenizer(f"the {row['words']}:")["input_ids"]
        space = "" if self.name in ("t5", "bart") else " "
        return prompt, [*self.tokenizer(space + answer)["input_ids"], END]

    def nll(self, row: dict[str, Any], answer: str) -> float:
        """−log p(answer|prompt), a forward pass for each token of the answer."""
        prompt, tokens = self.encoded(row, answer)
        total = 0.0
        for place, token in enumerate(tokens):
            with torch.no_grad():
                if self.name in ("t5", "bart"):
                    start = self.model.config.decoder_start_token_id
                    decoder = torch.tensor([[start, *tokens[:place]]])
                    logits = self.model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits
                else:
                    logits = self.model(input_ids=torch.tensor([prompt + tokens[:place]])).logits
            total -= float(logits[0, -1].log_softmax(0)[token])
        return total


def make_case(base: Base, name: str, folder: Path, role: str = "test", **fields: Any) -> Case:
    write_text_task(folder, name, **fields)
    model = model_for(base(name)).double()
    task = open_task(folder)
    tokenizer = AutoTokenizer.from_pretrained(base(name))
    rows = [json.loads(line) for line in (folder / f"{role}.jsonl").read_text().splitlines()]
    examples, labels = task.examples(role, task.type.load_processor(str(base(name)), None), model.config)
    return Case(name, model, tokenizer, task.type, rows, examples, labels)


@pytest.fixture(scope="module", params=LANGUAGE_MODELS)
def case(request: pytest.FixtureRequest, language_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(language_base, request.param, tmp_path_factory.mktemp("pets") / "task")


def test_nll_is_the_sum_over_the_answers_tokens_and_its_end(case: Case) -> None:
    found = case.type.nll(case.model, case.examples.batch(range(12)))
    expected = [case.nll(row, LABELS[row["animal"]]) for row in case.rows]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(12)), size=st.integers(1, 12))
def test_neither_order_nor_batch_nor_padding_changes_the_nll(case: Case, order: list[int], size: int) -> None:
    alone = torch.cat([case.type.nll(case.model, case.examples.batch([index])) for index in range(12)])
    for start in range(0, 12, size):
        chosen = order[start : start + size]
        together = case.type.nll(case.model, case.examples.batch(chosen))
        torch.testing.assert_close(together, alone[chosen], rtol=1e-9, atol=1e-9)


def test_the_batch_says_itself_what_the_decoder_reads_and_what_is_padding(case: Case) -> None:
    batch = case.examples.batch(range(12))
    assert len(set(case.examples.lengths)) > 2
    assert all(len(value) == 12 for value in batch.values())
    if case.name in ("t5", "bart"):
        start = case.model.config.decoder_start_token_id
        assert batch["decoder_input_ids"][:, 0].tolist() == [start] * 12
        torch.testing.assert_close(batch["decoder_input_ids"][:, 1:], batch["labels"][:, :-1].clamp(min=0))
    else:
        assert batch["labels"].shape == batch["input_ids"].shape
        assert ((batch["labels"] != -100) <= (batch["attention_mask"] == 1)).all()


def test_a_likelihood_is_in_float32_or_wider(case: Case) -> None:
    model = model_for(Path(case.model.name_or_path)).to(torch.bfloat16)
    assert case.type.nll(model, case.examples.batch([0, 1])).dtype == torch.float32


def test_the_likeliest_class_is_the_answer(case: Case) -> None:
    order = [7, 2, 9, 0]
    found = case.type.score(case.model, case.examples, order)
    table = [[case.nll(case.rows[index], label) for label in LABELS] for index in order]
    expected = [min(range(2), key=row.__getitem__) for row in table]
    assert found.chosen == expected
    assert found.texts == [LABELS[choice] for choice in expected]
    assert found.right == [choice == case.rows[index]["animal"] for choice, index in zip(expected, order, strict=True)]
    true = [row[case.rows[index]["animal"]] for row, index in zip(table, order, strict=True)]
    assert found.losses.tolist() == pytest.approx(true, rel=1e-9)
    assert not any(found.cut)


def test_classes_are_drawn_by_their_likelihood(case: Case) -> None:
    losses = torch.tensor([case.nll(case.rows[3], label) for label in LABELS])
    first = float((-losses).softmax(0)[0])
    uniform = torch.tensor([first - 1e-6, first + 1e-6], dtype=torch.float64)
    assert case.type.draw(case.model, case.examples, [3, 3], uniform) == [0, 1]
    relabelled = case.examples.collate([case.examples.labelled(3, 0)])
    assert float(case.type.nll(case.model, relabelled)) == pytest.approx(float(losses[0]), rel=1e-6)


def by_hand(case: Case, prompt: list[int], most: int) -> tuple[list[int], bool]:
    """The likeliest token, one after the other; and whether the answer ended."""
    written: list[int] = []
    for _ in range(most):
        with torch.no_grad():
            if case.name in ("t5", "bart"):
                decoder = torch.tensor([[case.model.config.decoder_start_token_id, *written]])
                logits = case.model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits
            else:
                logits = case.model(input_ids=torch.tensor([prompt + written])).logits
        token = int(logits[0, -1].argmax())
        if token == END:
            return written, True
        written.append(token)
    return written, False


def make_talkative(model: nn.Module) -> None:
    """Weights so large that answers differ from prompt to prompt."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in (parameter for parameter in model.parameters() if parameter.dim() == 2):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_what_is_generated_is_the_likeliest_token_after_token(language_base: Base, name: str, tmp_path: Path) -> None:
    fields = {"labels": None, "columns": {}, "answer": "{{ colour }}", "max_new_tokens": 6}
    case = make_case(language_base, name, tmp_path / "task", **fields)
    make_talkative(case.model)
    expected = [by_hand(case, case.encoded(row, "")[0], 6) for row in case.rows]
    assert len({tuple(written) for written, _ in expected}) > 1
    found = case.type.score(case.model, case.examples, list(range(12)))
    special = case.tokenizer.decode
    assert found.texts == [special(written, skip_special_tokens=True).strip() for written, _ in expected]
    assert found.cut == [not ended for _, ended in expected]
    assert found.right == [text == "red" for text in found.texts]
    assert found.chosen == [None if text != "red" else 0 for text in found.texts]
    assert found.losses.tolist() == pytest.approx([case.nll(row, "red") for row in case.rows], rel=1e-9)
    alone = [case.type.score(case.model, case.examples, [index]) for index in range(12)]
    assert [one.texts[0] for one in alone] == found.texts


def test_what_is_written_must_be_a_text_of_the_verbalizer(language_base: Base, tmp_path: Path) -> None:
    words = {"dog": "the dog", "cat": "the cat"}
    case = make_case(language_base, "gpt2-lm", tmp_path / "task", scoring="generation", verbalizer=words)

    class Says(nn.Module):
        """Writes the same to every prompt."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))
            self.generation_config = case.model.generation_config

        def forward(self, **batch: Tensor) -> Any:
            return case.model(**batch)

        def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
            written = torch.tensor([*case.tokenizer(" the cat")["input_ids"], END])
            return torch.cat([input_ids, written.expand(len(input_ids), -1)], 1)

    found = case.type.score(Says(), case.examples, [0, 1])
    assert found.texts == ["the cat", "the cat"]
    assert found.chosen == [1, 1]
    assert found.right == [False, True]
    assert not any(found.cut)


def test_a_causal_prompt_that_is_too_long_loses_its_front(language_base: Base, tmp_path: Path) -> None:
    case = make_case(language_base, "llama-lm", tmp_path / "task", prompt="{% for i in range(30) %}cat {% endfor %}dog")
    whole = case.tokenizer("cat " * 30 + "dog")["input_ids"]
    batch = case.examples.batch([0])
    assert case.examples.truncated == 12
    assert batch["input_ids"][0].tolist() == [*whole[-22:], case.tokenizer(" dog")["input_ids"][0]]  # 24 with the end
    assert batch["labels"][0].tolist() == [-100] * 21 + [case.tokenizer(" dog")["input_ids"][0], END]


def test_an_encoders_prompt_that_is_too_long_loses_its_end(language_base: Base, tmp_path: Path) -> None:
    case = make_case(language_base, "t5", tmp_path / "task", prompt="{% for i in range(30) %}cat {% endfor %}dog")
    assert case.examples.truncated == 12
    assert case.examples.batch([0])["input_ids"][0].tolist() == case.tokenizer("cat " * 30)["input_ids"][:24]


@pytest.mark.parametrize("name", ["t5", "gpt2-lm"])
def test_every_class_is_asked_with_the_same_prompt(language_base: Base, name: str, tmp_path: Path) -> None:
    long = {"dog": "dog", "cat": "cat cat cat cat cat cat"}
    prompt = "{% for i in range(17) %}red {% endfor %}{{ words }}"
    case = make_case(language_base, name, tmp_path / "task", prompt=prompt, verbalizer=long)
    for index in range(12):
        dog, cat = case.examples.labelled(index, 0), case.examples.labelled(index, 1)
        keep = len(dog["input_ids"]) - (0 if name == "t5" else 1)
        assert dog["input_ids"][:keep].tolist() == cat["input_ids"][:keep].tolist()


@pytest.mark.parametrize(("name", "longest"), [("t5", 24), ("gpt2-lm", 23)])
def test_an_answer_that_does_not_fit_alone_is_an_error_with_its_row(
    language_base: Base, name: str, longest: int, tmp_path: Path
) -> None:
    fields = {
        "labels": None,
        "columns": {},
        "answer": f"{{% if colour == 'blue' %}}{'cat ' * 40}{{% else %}}{{{{ words }}}}{{% endif %}}",
    }
    folder = write_text_task(tmp_path / "task", name, **fields)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[5]["colour"] = "blue"
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = open_task(folder)
    config = model_for(language_base(name)).config
    processor = task.type.load_processor(str(language_base(name)), None)
    with pytest.raises(PimergeError, match=rf"row 5 .*: the answer has 41 tokens .*room for {longest}"):
        task.examples("train", processor, config)


def chat_case(language_base: Base, tmp_path: Path, template: str | None) -> tuple[Any, Examples]:
    task = open_task(write_text_task(tmp_path / "task", "llama-lm", chat=True))
    tokenizer = task.type.load_processor(str(language_base("llama-lm")), None)
    tokenizer.chat_template = template
    examples, _ = task.examples("train", tokenizer, model_for(language_base("llama-lm")).config)
    return tokenizer, examples


def test_a_chat_ends_with_the_templates_end_of_turn(language_base: Base, tmp_path: Path) -> None:
    tokenizer, examples = chat_case(language_base, tmp_path, CHAT)
    row = json.loads((tmp_path / "task" / "train.jsonl").read_text().splitlines()[0])
    turn = [{"role": "user", "content": f"the {row['words']}:"}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    expected = [*tokenizer(prompt)["input_ids"], *tokenizer("dog")["input_ids"]][-23:]
    batch = examples.batch([0])
    assert batch["input_ids"][0].tolist() == expected
    assert batch["labels"][0].tolist()[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") != END


def test_a_chat_without_a_template_is_an_error(language_base: Base, tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match="no chat template"):
        chat_case(language_base, tmp_path, None)


def test_more_new_tokens_than_there_is_room_for_are_an_error(language_base: Base, tmp_path: Path) -> None:
    with pytest.raises(PimergeError, match="max_new_tokens is 24, and the model has room for 23"):
        make_case(language_base, "gpt2-lm", tmp_path / "task", scoring="generation", max_new_tokens=24)


def test_a_prompt_leaves_room_for_what_is_generated(language_base: Base, tmp_path: Path) -> None:
    """GPT-2 has no positions beyond its last."""
    prompt = "{% for i in range(40) %}cat {% endfor %}"
    fields = {"prompt": prompt, "labels": None, "columns": {}, "answer": "red", "max_new_tokens": 20}
    case = make_case(language_base, "gpt2-lm", tmp_path / "task", **fields)
    assert case.examples.writing.prompts([0])["input_ids"].shape[1] == 4
    assert len(case.type.score(case.model, case.examples, [0, 1]).texts) == 2


def test_a_tokenizer_without_an_end_is_an_error(language_base: Base, tmp_path: Path) -> None:
    task = open_task(write_text_task(tmp_path / "task", "llama-lm"))
    tokenizer, config = (
        task.type.load_processor(str(language_base("llama-lm")), None),
        model_for(language_base("llama-lm")).config,
    )
    tokenizer.eos_token = config.eos_token_id = None
    with pytest.raises(PimergeError, match="end token"):
        task.examples("train", tokenizer, config)


def test_buckets_are_of_prompt_and_answer(case: Case) -> None:
    expected = [sum(map(len, case.encoded(row, LABELS[row["animal"]]))) for row in case.rows]
    assert list(case.examples.lengths) == expected


def test_free_answers_cannot_be_sampled(language_base: Base, tmp_path: Path) -> None:
    fields = {"labels": None, "columns": {}, "answer": "{{ colour }}"}
    case = make_case(language_base, "t5", tmp_path / "task", **fields)
    with pytest.raises(PimergeError, match="free text"):
        case.type.draw(case.model, case.examples, [0], torch.zeros(1))
