"""Where a config states the size of the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from pimerge.checkpoints.vocabularies import vocabulary_of, with_vocabulary

TEXT = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2}


@pytest.mark.parametrize("outer", [{}, {"vocab_size": 64}])
def test_a_multimodal_config_states_it_in_its_text_part_and_outside_only_if_it_did(outer: dict[str, Any]) -> None:
    config = {"text_config": TEXT, "image_token_index": 3, **outer}
    changed = with_vocabulary(transformers.LlavaConfig(text_config=TEXT), config, 70)
    assert changed == {"text_config": {**TEXT, "vocab_size": 70}, "image_token_index": 3, **dict.fromkeys(outer, 70)}
    assert vocabulary_of(changed) == 70


def test_the_config_of_a_language_model_states_it_itself() -> None:
    assert with_vocabulary(transformers.LlamaConfig(**TEXT), TEXT, 70) == {**TEXT, "vocab_size": 70}
