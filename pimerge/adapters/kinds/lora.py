"""Low-rank updates ΔW = s·B·A of Linear, Conv and Embedding layers (LoRA, arXiv 2106.09685).

:mod:`pimerge.adapters.lora_module` states the layout of the factors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pimerge.adapters.keys import PREFIX, base_biases, sort_keys
from pimerge.adapters.kind import AdapterHeader, Kind
from pimerge.adapters.kinds._lora_config import conversions_of, refuse_unhandled, well_typed
from pimerge.adapters.kinds._lora_parameters import bare_parameters
from pimerge.adapters.kinds._lora_variants import as_variant, factor_shapes
from pimerge.adapters.lora_module import DORA, OLORA, LoraModule, pattern_value
from pimerge.core.errors import Problems

_FACTOR_KEY = re.compile(
    re.escape(PREFIX) + r"(?P<module>.+)\.(?:lora_(?P<factor>[AB])\.weight|lora_B\.(?P<bias>bias)"
    r"|lora_embedding_(?P<embedding>[AB])|lora_(?P<magnitude>magnitude)_vector(?:\.weight)?|lora_(?P<diag>diag)"
    r"|lora_(?P<unused>velora_embed|monteclora_sampler\..+))"  # used in training only
)


def parse(header: AdapterHeader) -> tuple[dict[str, LoraModule], dict[str, str]]:
    """Read the layout of a LoRA expert.

    >>> modules, head = parse(AdapterHeader({"r": 2, "lora_alpha": 4}, {
    ...     "base_model.model.q.lora_A.weight": (2, 8), "base_model.model.q.lora_B.weight": (6, 2)}))
    >>> modules["q"].scaling, modules["q"].d_out, head
    (2.0, 6, {})
    """
    problems = Problems()
    config = well_typed(header.config, problems)
    refuse_unhandled(config, problems, convert=header.convert)
    own = {key: shape for key, shape in header.shapes.items() if key not in base_biases(config, header.shapes)}
    keys, head = sort_keys(config, own, _slot_of, "LoRA factors", problems)
    modules = bare_parameters(config, keys, header.shapes, problems)
    for name in keys:
        if module := _module(name, keys[name], config, header.shapes, problems, convert=header.convert):
            modules[name] = module
    problems.raise_any("this LoRA cannot be used")
    return dict(sorted(modules.items())), head


def is_B_factor(key: str) -> bool:
    """Whether a key names a factor B, whose Fisher information distinguishes tasks best.

    >>> [is_B_factor(f"base_model.model.q.lora_{end}") for end in ("B.weight", "A.weight", "B.bias")]
    [True, False, False]
    """
    return key.endswith((".lora_B.weight", ".lora_embedding_B"))


def _slot_of(key: str) -> tuple[str, str] | None:
    match = _FACTOR_KEY.fullmatch(key)
    if match is None:
        return None
    slots = ("factor", "embedding", "bias", "magnitude", "diag", "unused")
    return match["module"], next(match[slot] for slot in slots if match[slot])


def _shapes_of_factors(
    name: str,
    keys: Mapping[str, str],
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    problems: Problems,
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The shapes of the factors A and B; None, with a problem added, if the tensors do not form a pair of factors."""
    missing = {"A", "B"} - set(keys)
    if missing:
        problems.add(f"module '{name}' has no factor {' and '.join(sorted(missing))}", "save the adapter again")
        return None
    shape_A, shape_B = factor_shapes(name, keys, config, shapes)
    if len(shape_A) > 2 and len(shape_B) > 2 and shape_A[0] > shape_B[1] and shape_A[0] % shape_B[1] == 0:
        problems.add(
            f"module '{name}': A is {shape_A} and B is {shape_B}: a LoRA of a grouped convolution, which PEFT cannot "
            "merge into its base either",
            "leave the module out (--exclude), or train without it",
        )
        return None
    if len(shape_A) < 2 or len(shape_B) < 2 or shape_B[1] != shape_A[0]:
        problems.add(
            f"module '{name}': A is {shape_A} and B is {shape_B}, expected (r, d_in, …) and (d_out, r, …)",
            "save the adapter again",
        )
        return None
    return shape_A, shape_B


def _module(
    name: str,
    keys: Mapping[str, str],
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    problems: Problems,
    *,
    convert: bool,
) -> LoraModule | None:
    pair = _shapes_of_factors(name, keys, config, shapes, problems)
    if pair is None:
        return None
    shape_A, shape_B = pair
    rank = shape_A[0]
    stated = pattern_value(config.get("rank_pattern") or {}, name, config.get("r", rank))
    if stated != rank:
        problems.add(
            f"module '{name}': the tensors have rank {rank}, adapter_config.json says {stated}",
            "the config belongs to another adapter; save both together",
        )
    alpha = pattern_value(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    bias = keys.get("bias")
    if bias and shapes[bias] != shape_B[:1]:
        problems.add(f"module '{name}': lora_B.bias is {shapes[bias]}, expected {shape_B[:1]}")
    layer = "embedding" if "lora_embedding_" in keys["A"] else "conv" if len(shape_A) > 2 else "linear"
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    conversions = conversions_of(config)
    if set(conversions) - {DORA} and (layer != "linear" or (OLORA in conversions and config.get("fan_in_fan_out"))):
        problems.add(
            f"module '{name}': {' with '.join(conversions)} is converted for Linear layers only",
            "merge it into a base of its own with PEFT",
        )
    _check_magnitude(
        name, keys.get("magnitude"), shape_B[0], shapes, problems, is_dora=DORA in conversions, convert=convert
    )
    module = LoraModule(
        name,
        keys["A"],
        keys["B"],
        bias,
        rank,
        float(alpha),
        scaling,
        layer,
        tuple(shape_A),
        tuple(shape_B),
        keys.get("magnitude"),
        conversions,
    )
    return as_variant(module, keys, config, problems)


def _check_magnitude(
    name: str,
    key: str | None,
    d_out: int,
    shapes: Mapping[str, tuple[int, ...]],
    problems: Problems,
    *,
    is_dora: bool,
    convert: bool,
) -> None:
    """Add a problem unless DoRA, and only DoRA, has a magnitude for each output of the module."""
    if key and (not is_dora or math.prod(shapes[key]) != d_out):
        problems.add(
            f"{key} is {shapes[key]}, but use_dora is {'on' if is_dora else 'off'}",
            f"only DoRA has one in each module, of {d_out} entries: save config and tensors together",
        )
    elif is_dora and not key and convert:
        problems.add(f"module '{name}' has no lora_magnitude_vector, but use_dora is on", "save the adapter again")


KIND = Kind(
    name="lora",
    summary="Low-rank updates of Linear, Conv and Embedding layers, and of bare parameters.",
    formula="ΔW = s · B A",
    paper="LoRA (arXiv 2106.09685)",
    peft_type="LORA",
    slots=("lora_monteclora_sampler.", "lora_", "base_layer"),  # the first that matches counts
    has_update=True,
    stores_factors=True,
    init_slots=("A",),
    parse=parse,
)
