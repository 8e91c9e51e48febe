"""PEFT is the oracle: it must adapt exactly the modules that the fields name, at their ranks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from pimerge.adapters.lora_fields import rank_fields, ranks_to_write

PARTS = ["proj", "out", "0", "10", "a+b", "x(1", "q_proj", "xproj", "experts"]
"""Names that end others, and names with characters of regular expressions."""


@st.composite
def trees(draw: st.DrawFn) -> list[str]:
    """Names of layers, none of which is the parent of another."""
    drawn = draw(st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map(".".join), min_size=1))
    found: list[str] = []
    for name in drawn:
        if not any(f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.") for other in found):
            found.append(name)
    return found


def model_of(names: list[str]) -> nn.Module:
    root = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        owner = root
        for part in parents:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, nn.Linear(2, 2))
    return root


@settings(max_examples=150, deadline=None)
@given(trees(), st.data())
def test_peft_adapts_exactly_these_modules_at_their_ranks(names: list[str], data: st.DataObject) -> None:
    ranks = data.draw(st.dictionaries(st.sampled_from(names), st.integers(1, 4), min_size=1))
    written = ranks_to_write(ranks)
    model = model_of(names)
    config = LoraConfig(**rank_fields(written, [name for name, _ in model.named_modules()]))
    adapted = get_peft_model(model, config).base_model.model
    found = {
        name: (layer.r["default"], layer.scaling["default"])
        for name, layer in adapted.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert found == {name: (rank, 1.0) for name, rank in written.items()}


def test_a_base_with_other_names_does_not_change_the_list() -> None:
    assert rank_fields({"model.q": 2}, ["x.model.q", "y"])["target_modules"] == ["model.q"]
