"""The likeliest of a row's choices (columns ``question``, ``choices``, ``answer``).

If no column contains all choices, the template ``choices`` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError, Problems
from pimerge.tasks.examples import Examples, Rows
from pimerge.tasks.row_errors import RowProblems
from pimerge.tasks.task_type import TaskType
from pimerge.tasks.types import causal_lm, seq2seq
from pimerge.tasks.types._generation import draw, read, score
from pimerge.tasks.types._likelihood import nll
from pimerge.tasks.types._templates import Template, Text, reader, require_columns
from pimerge.tasks.types._text_examples import TextRows
from pimerge.tasks.types._tokenizer import load_processor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pimerge.tasks.schema import TaskFile

_PROMPT = "Question: {{ QUESTION }}\nAnswer:"
_QUESTION = "QUESTION"


def check(file: TaskFile) -> None:
    """Check the templates."""
    problems = Problems()
    if file.labels is not None:
        problems.add("labels are the same for all rows, but here each row has its own choices", "leave the labels out")
    with problems.collected():
        Template("prompt", file.prompt or _PROMPT)
    if file.choices is not None:
        if "choices" in file.columns:
            problems.add("both choices and columns define the choices", "leave one of them out")
        with problems.collected():
            Template("choices", file.choices)
    problems.raise_any("it does not fit")


def encode(rows: Rows, file: TaskFile, processor: Any, config: PreTrainedConfig) -> Examples:
    """Encode every question with each of its choices, for a causal model or an encoder-decoder."""
    worded = TextRows(rows, _texts(rows, file), file, by_likelihood=True)
    if not config.is_encoder_decoder:
        return causal_lm.encode_texts(worded, processor, config)
    if file.chat:
        raise PimergeError("'chat' is for causal models, and the base has an encoder and a decoder", "leave it out")
    return seq2seq.encode_texts(worded, processor, config)


def _texts(rows: Rows, file: TaskFile) -> list[Text]:
    """Turn every row into texts."""
    template = Template("prompt", file.prompt or _PROMPT)
    listed = Template("choices", file.choices) if file.choices is not None else None
    used = template.names - {_QUESTION} | (listed.names if listed else set())
    require_columns(rows, used)
    problems = RowProblems(rows.where, rows.numbers)
    found = []
    read = reader(rows, used | set(rows.columns.values()))
    for place in range(len(rows.labels)):
        row, prompt = None, ""
        with problems.row(place):
            row = read(place)
            prompt = template.text({**row, _QUESTION: row[rows.columns["question"]]})
            if not prompt.strip():
                raise PimergeError("the prompt is empty", "fill the row or leave it out")
        if row is None:
            continue
        with problems.row(place):
            choices, keys = _choices(listed.values(row) if listed else row[rows.columns["choices"]])
            right = _right(row[rows.columns["answer"]], choices, keys)
            found.append(Text(prompt, choices, right, (choices[right],)))
    problems.raise_any()
    return found


def _choices(value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The choices, and their keys if they have keys.

    >>> _choices({"text": ["red", "blue"], "label": ["A", "B"]})
    (('red', 'blue'), ('A', 'B'))
    """
    texts, keys = (value.get("text"), value.get("label") or []) if isinstance(value, Mapping) else (value, [])
    if not isinstance(texts, Sequence) or isinstance(texts, str) or len(texts) < 2:
        raise PimergeError(
            f"the choices are {texts!r}", "give a list of two or more, or text and label, two such lists"
        )
    if wrong := [text for text in texts if not isinstance(text, str | int | float | None)]:
        raise PimergeError(f"a choice is {wrong[0]!r}", "write each choice as a text")
    choices = tuple("" if text is None else str(text).strip() for text in texts)
    if "" in choices:
        raise PimergeError("a choice is empty", "fill the row or leave it out")
    if keys and len(keys) != len(choices):
        raise PimergeError(f"there are {len(choices)} choices and {len(keys)} labels of them", "give each choice one")
    return choices, tuple(map(str, keys))


def _right(answer: Any, choices: Sequence[str], keys: Sequence[str]) -> int:
    """The index of the choice that the answer names by key, position from 0, or text.

    >>> _right("B", ["red", "blue"], ["A", "B"]), _right(0, ["red", "blue"], []), _right("blue", ["red", "blue"], [])
    (1, 0, 1)
    """
    places = [str(place) for place in range(len(choices))]
    for names in (keys, choices, places) if isinstance(answer, str) else (keys, places):
        if str(answer).strip() in names:
            return list(names).index(str(answer).strip())
    known = ", ".join(keys or places)
    raise PimergeError(f"the answer is {answer!r}", f"expected one of {known}")


TASK_TYPE = TaskType(
    name="multiple-choice",
    summary="The likeliest of a row's choices (columns ``question``, ``choices``, ``answer``).",
    auto_model=("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"),
    peft_task=("CAUSAL_LM", "SEQ_2_SEQ_LM"),
    trains_head=False,
    columns={"question": True, "choices": True, "answer": True},
    usual_columns={"question": ("question",), "choices": ("choices",), "answer": ("answer", "answerKey")},
    fields=frozenset({"prompt", "choices", "normalise", "chat", "metrics"}),
    answers=("choices", "texts"),
    check=check,
    load_processor=load_processor,
    encode=encode,
    nll=nll,
    draw=draw,
    score=score,
    read=read,
)
