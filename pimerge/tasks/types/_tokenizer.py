"""The base's tokenizer, and its longest input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NO_BOUND = 10**9


def load_processor(source: str, revision: str | None) -> Any:
    """The base's tokenizer; a model without a padding token pads with its end token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def longest_input(tokenizer: Any, config: PreTrainedConfig) -> int:
    """The most tokens that the model takes; a very large number where there is no bound."""
    positions = getattr(config, "max_position_embeddings", None) or _NO_BOUND
    return int(min(tokenizer.model_max_length, positions, _NO_BOUND))
