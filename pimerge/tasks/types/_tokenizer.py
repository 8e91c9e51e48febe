"""What the types of text share: the base's tokenizer, and how much it takes."""

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
    """Tokens that the model takes; many have no bound, which is a very large number here."""
    positions = getattr(config, "max_position_embeddings", None) or _NO_BOUND
    return int(min(tokenizer.model_max_length, positions, _NO_BOUND))
