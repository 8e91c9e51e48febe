from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pimerge.adapters.base_weights import layer_shapes
from pimerge.checkpoints import key_mapping
from pimerge.checkpoints.base import find_base
from pimerge.checkpoints.checkpoint import Checkpoint
from pimerge.checkpoints.key_mapping import Names, names_of
from pimerge.core.errors import PimergeError
from tests.support.bases import model_for


def test_shapes_are_those_of_the_model(bert_base: Path, gpt2_base: Path) -> None:
    for folder, modules in (
        (bert_base, ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]),
        (gpt2_base, ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]),
    ):
        weights = model_for(folder).state_dict()
        found = layer_shapes(find_base(str(folder), None, folder), modules)
        for module in modules:
            shape = tuple(weights[f"{module}.weight"].shape)
            assert found[module] == (shape[::-1] if folder == gpt2_base else shape)  # GPT-2's have d_in first


def test_a_module_that_the_base_lacks_is_named(bert_base: Path) -> None:
    with pytest.raises(PimergeError, match=r"no weight for module 'bert\.nowhere'"):
        layer_shapes(find_base(str(bert_base), None, bert_base), ["bert.nowhere"])


def test_transformers_is_asked_by_one_thread_at_a_time(vit_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = []

    def asked(checkpoint: Checkpoint) -> Names:
        locked.append(key_mapping._ONE_AT_A_TIME.locked())
        return names_of(checkpoint)

    monkeypatch.setattr(key_mapping, "names_of", asked)
    key_mapping._remembered.cache_clear()
    base = find_base(str(vit_base), None, vit_base)
    module = "vit.layers.0.attention.q_proj"
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: layer_shapes(base, [module]), range(4)))
    assert found == [{module: (16, 16)}] * 4
    assert locked == [True]
