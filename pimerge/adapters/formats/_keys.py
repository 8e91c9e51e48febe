"""The endings of keys in all formats, and the tensors of a file grouped by module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from pimerge.adapters.format import Ending, KeySummary

DOWN_UP = Ending(
    "down-up", {"A": ".lora_down.weight", "B": ".lora_up.weight", "mid": ".lora_mid.weight", "bias": ".lora_up.bias"}
)
A_B = Ending("A-B", {"A": ".lora_A.weight", "B": ".lora_B.weight", "bias": ".lora_B.bias"})
_NAMED = re.compile(r"(?P<stem>.+)\.lora_(?P<slot>[AB])\.(?P<adapter>[^.]+)\.weight")
_SPLIT = re.compile(r"(?P<stem>.+)\.lora_(?P<half>down|up)\.(?P<part>\d+)\.weight")
_SCALE = re.compile(r"(?P<weight>.+)\.(?:scale_weight|weight_scale)")  # of a tensor of 8 bits


@cache
def of_adapter(adapter: str) -> Ending:
    """The endings of PEFT's parameters in memory, which name the adapter.

    >>> of_adapter("default").slots["A"]
    '.lora_A.default.weight'
    """
    return Ending("A-B named", {slot: f".lora_{slot}.{adapter}.weight" for slot in "AB"})


A_B_NAMED = of_adapter("default")
BARE = Ending("A-B bare", {"A": ".lora_A", "B": ".lora_B"})
LORA_LAYER = Ending("lora layer", {"A": ".lora.down.weight", "B": ".lora.up.weight"})
ATTENTION_PROCESSOR = Ending("attention processor", {"A": "_lora.down.weight", "B": "_lora.up.weight"})
LINEAR_LAYER = Ending("linear layer", {"A": ".lora_linear_layer.down.weight", "B": ".lora_linear_layer.up.weight"})
NUMBERED = Ending("numbered", {"A": ".down.weight", "B": ".up.weight"})  # XLabs: processor.proj_lora1.down.weight
TRANSPOSED = Ending("transposed", {"A": ".lora_a", "B": ".lora_b"}, transposed=True)
ENDINGS = (DOWN_UP, A_B, A_B_NAMED, BARE, LORA_LAYER, ATTENTION_PROCESSOR, LINEAR_LAYER, NUMBERED, TRANSPOSED)

HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
PRODUCTS = {"hada": HADAMARD, "lokr": KRONECKER}
NUMBERS = ("alpha", "scalar", "scale_A", "scale_B")
"""Slots of numbers: alpha, and factors of ΔW: LyCORIS' trained scalar, and the scales of factors stored in 8 bits."""
WHOLE = ("diff", "w_norm")  # ΔW itself, of a layer or of a norm
BIASES = ("diff_b", "b_norm")  # the update of a bias, which no alpha scales
_DORA = "DoRA rescales the base's weights, which this file does not hold"
_ROTATION = "it multiplies the base's weights by an orthogonal matrix, which is not an update that can be added"
_OF_THE_BASE = "its update depends on the base's weights, which this file does not hold"
REFUSED = {
    "dora_scale": _DORA,
    "lora_magnitude_vector": _DORA,
    "lora_magnitude_vector.weight": _DORA,
    "m": _DORA,
    "set_weight": "it replaces the base's weight instead of changing it",
    "reshape_weight": "it changes the shape of the base's weight",
    "a1.weight": _OF_THE_BASE,
    "a2.weight": _OF_THE_BASE,
    "b1.weight": _OF_THE_BASE,
    "b2.weight": _OF_THE_BASE,
    "bm.weight": _OF_THE_BASE,
    "on_input": _OF_THE_BASE,
    "oft_blocks": _ROTATION,
    "oft_diag": _ROTATION,
    "rescale": _ROTATION,
    "lora_a_scales": "its factors are quantised",
    "lora_b_scales": "its factors are quantised",
}
"""Slots whose update the file alone does not determine, and why."""
_PLAIN = ("alpha", "scalar", *HADAMARD, *KRONECKER, *WHOLE, *BIASES, *REFUSED)
_PLACES = sorted(
    [
        *((text, slot, ending) for ending in ENDINGS for slot, text in ending.slots.items()),
        *((f".{slot}", slot, None) for slot in _PLAIN),
    ],
    key=lambda place: -len(place[0]),  # of several endings that fit, the longest
)
_TEXTS = tuple(text for text, _, _ in _PLACES)


@dataclass
class Group:
    """The tensors of one module: slot → key, and the ending of its factors if it has any."""

    stem: str
    keys: dict[str, str] = field(default_factory=dict)
    ending: Ending | None = None


def grouped(keys: Iterable[str]) -> tuple[dict[str, Group], list[str]]:
    """Group keys by stem; also the keys without a known ending, and those of a slot that is there already.

    >>> groups, unknown = grouped(["q.lora_down.weight", "q.alpha", "q.other"])
    >>> groups["q"].keys, groups["q"].ending.name, unknown
    ({'A': 'q.lora_down.weight', 'alpha': 'q.alpha'}, 'down-up', ['q.other'])
    """
    groups: dict[str, Group] = {}
    unknown = []
    for key in keys:
        found = _parsed(key)
        if found is None:
            unknown.append(key)
            continue
        stem, slot, ending = found
        group = groups.setdefault(stem, Group(stem))
        if slot in group.keys or (ending and group.ending not in (None, ending)):
            unknown.append(key)
            continue
        group.keys[slot] = key
        group.ending = ending or group.ending
    return groups, unknown


def _parsed(key: str) -> tuple[str, str, Ending | None] | None:
    """Stem, slot and ending of a key; None for a key without a known ending."""
    if match := _NAMED.fullmatch(key):
        return match["stem"], match["slot"], of_adapter(match["adapter"])
    if match := _SPLIT.fullmatch(key):
        return match["stem"], f"{'A' if match['half'] == 'down' else 'B'}.{match['part']}", DOWN_UP
    if match := _SCALE.fullmatch(key):
        weight = _parsed(f"{match['weight']}.weight")
        return (weight[0], f"scale_{weight[1]}", weight[2]) if weight and weight[1] in ("A", "B") else None
    if not key.endswith(_TEXTS):
        return None
    text, slot, ending = next(place for place in _PLACES if key.endswith(place[0]))
    return key[: -len(text)], slot, ending


def summarised(keys: Iterable[str], *, has_config: bool) -> KeySummary:
    """What tells the format of a file with these keys."""
    given = list(keys)
    groups, _ = grouped(given)
    return KeySummary(
        given,
        frozenset(groups),
        frozenset(group.ending.name for group in groups.values() if group.ending),
        frozenset(slot for group in groups.values() for slot in group.keys) - {"A", "B", "mid", "bias", *NUMBERS[1:]},
        has_config,
    )


def shown(names: Mapping[str, object] | list[str]) -> str:
    """The first few names of many, for a message.

    >>> shown(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
