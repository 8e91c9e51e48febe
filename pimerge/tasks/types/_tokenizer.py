"""Load the base's tokenizer, and find its maximum input length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pimerge.core import hf_loading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig

    from pimerge.tasks.examples import Batch

_NO_BOUND = 10**9


def load_processor(source: str, revision: str | None) -> Any:
    """Load the base's tokenizer; without a padding token, the end token is used for padding."""
    from transformers import AutoTokenizer

    tokenizer = hf_loading.load_processor(AutoTokenizer, source, revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def padded(tokenizer: Any, examples: Sequence[Batch]) -> Batch:
    """Collate tokenized examples without their labels."""
    inputs = [{name: value for name, value in example.items() if name != "labels"} for example in examples]
    return dict(tokenizer.pad(inputs, return_tensors="pt"))


def longest_input(tokenizer: Any, config: PreTrainedConfig) -> int:
    """The maximum number of input tokens; a very large number if unlimited."""
    positions = getattr(config, "max_position_embeddings", None) or _NO_BOUND
    return int(min(tokenizer.model_max_length, positions, _NO_BOUND))
