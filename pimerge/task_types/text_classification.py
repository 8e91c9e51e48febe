"""Classes of texts or pairs of texts (columns ``text``, optional ``text_pair``, ``label``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pimerge.task_types import Batch, Examples
from pimerge.task_types._classification import draw, nll, score

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["AUTO_MODEL", "COLUMNS", "PEFT_TASK", "draw", "encode", "load_processor", "nll", "score"]

AUTO_MODEL = "AutoModelForSequenceClassification"
PEFT_TASK = "SEQ_CLS"
COLUMNS = {"text": True, "text_pair": False, "label": True}


def load_processor(source: str, revision: str | None) -> Any:
    """The base's tokenizer; a model without a padding token pads with its end token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(
    rows: Any,
    columns: Mapping[str, str],
    labels: Sequence[int],
    processor: Any,
    config: PreTrainedConfig,
) -> Examples:
    """Tokenize every row once; texts longer than the model takes are cut."""
    longest = min(processor.model_max_length, getattr(config, "max_position_embeddings", None) or 10**9)
    pairs = rows[columns["text_pair"]] if "text_pair" in columns else None
    texts = [str(text) for text in rows[columns["text"]]]
    pairs = [str(text) for text in pairs] if pairs is not None else None
    whole = processor(texts, pairs, truncation=False, verbose=False)["input_ids"]
    cut = sum(len(ids) > longest for ids in whole)
    encoded = processor(texts, pairs, truncation=True, max_length=longest)
    lengths = [len(ids) for ids in encoded["input_ids"]]

    def get(index: int) -> Batch:
        fields = {name: torch.tensor(encoded[name][index]) for name in encoded}
        return {**fields, "labels": torch.tensor(labels[index])}

    def collate(examples: Sequence[Batch]) -> Batch:
        padded = processor.pad(
            [{name: value for name, value in example.items() if name != "labels"} for example in examples],
            return_tensors="pt",
        )
        return {**padded, "labels": torch.stack([example["labels"] for example in examples])}

    return Examples(lengths, get, collate, cut)
