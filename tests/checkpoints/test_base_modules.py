"""Names of modules within a base."""

from __future__ import annotations

from pimerge.checkpoints.base_modules import BaseModules


def test_names_within_a_model_are_found_from_either_side() -> None:
    headed = BaseModules(frozenset({"model.layers.0.q", "lm_head"}), "model")
    inner = BaseModules(frozenset({"layers.0.q"}))
    assert [headed.place(name) for name in ("model.layers.0.q", "layers.0.q", "lm_head", "model.layers.1.q")] == [
        "model.layers.0.q",
        "layers.0.q",
        "lm_head",
        None,
    ]
    assert headed.place("layers.0.q", "CAUSAL_LM") == "model.layers.0.q"
    assert inner.place("model.layers.0.q") == "model.layers.0.q"
    assert headed.place("model.model.layers.0.q") == "model.layers.0.q"


def test_the_text_model_of_a_multimodal_one_keeps_the_names_of_its_own_class() -> None:
    both = BaseModules(frozenset({"model.language_model.layers.0.q"}), "model")
    text = BaseModules(frozenset({"model.layers.0.q"}), "model")
    assert both.place("model.layers.0.q", "CAUSAL_LM") is None
    assert text.place("model.language_model.layers.0.q", "CAUSAL_LM") == "model.layers.0.q"
