"""Classes of texts or pairs of texts (columns ``text``, optional ``text_pair``, ``label``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError
from pimerge.tasks.examples import Batch, Examples, Rows
from pimerge.tasks.row_errors import RowProblems
from pimerge.tasks.task_type import TaskType
from pimerge.tasks.types._classification import FIELDS, draw, nll, read, score
from pimerge.tasks.types._tokenizer import load_processor, longest_input, padded

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pimerge.tasks.schema import TaskFile


def encode(rows: Rows, file: TaskFile, processor: Any, config: PreTrainedConfig) -> Examples:
    """Tokenize every row once; texts longer than the model's maximum are cut."""
    import torch

    longest = longest_input(processor, config)
    texts = list(rows.table[rows.columns["text"]])
    pairs = list(rows.table[rows.columns["text_pair"]]) if "text_pair" in rows.columns else None
    whole = processor(texts, pairs, truncation=False, verbose=False)["input_ids"]
    cut = sum(len(ids) > longest for ids in whole)
    encoded = processor(texts, pairs, truncation=True, max_length=longest)
    if config.is_encoder_decoder:
        _require_ends(encoded["input_ids"], rows, config)
    lengths = [len(ids) for ids in encoded["input_ids"]]

    def get(index: int) -> Batch:
        fields = {name: torch.tensor(encoded[name][index]) for name in encoded}
        return {**fields, "labels": torch.tensor(rows.labels[index])}

    def collate(examples: Sequence[Batch]) -> Batch:
        return {**padded(processor, examples), "labels": torch.stack([example["labels"] for example in examples])}

    return Examples(lengths, get, collate, cut)


def _require_ends(texts: Sequence[Sequence[int]], rows: Rows, config: PreTrainedConfig) -> None:
    """Check that all texts have the same number of end tokens; transformers' head reads the last one."""
    ends = [list(ids).count(config.eos_token_id) for ids in texts]
    usual = max(set(ends), key=ends.count)
    if not usual:
        raise PimergeError(
            f"the base's tokenizer adds no end token ({config.eos_token_id}) to a text, but the head of an "
            "encoder-decoder reads it",
            "use a tokenizer that does, or a task of the type seq2seq",
        )
    problems = RowProblems(rows.where, rows.numbers)
    for position, count in enumerate(ends):
        with problems.row(position):
            if count != usual:
                raise PimergeError(f"{count} end tokens, the others have {usual}", "leave out what reads as one")
    problems.raise_any()


TASK_TYPE = TaskType(
    name="text-classification",
    summary="Classes of texts or pairs of texts (columns ``text``, optional ``text_pair``, ``label``).",
    auto_model="AutoModelForSequenceClassification",
    peft_task="SEQ_CLS",
    trains_head=True,
    columns={"text": True, "text_pair": False, "label": True},
    texts=("text", "text_pair"),
    usual_columns={"text": ("text", "sentence"), "label": ("label",)},
    fields=FIELDS,
    class_name_role="text",
    load_processor=load_processor,
    encode=encode,
    nll=nll,
    draw=draw,
    score=score,
    read=read,
)
