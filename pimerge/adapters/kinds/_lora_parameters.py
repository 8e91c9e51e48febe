"""Find the updates of bare parameters (``target_parameters``) among the keys of a LoRA.

:mod:`pimerge.adapters.bare_parameter` states how PEFT stores them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pimerge.adapters.bare_parameter import ORDER_FIELD, ORDERS, ExpertOrder, SlicedModule, is_order_unknown, nesting
from pimerge.adapters.kind import Shapes
from pimerge.adapters.lora_module import BareParameter, LoraModule, pattern_value
from pimerge.core.errors import Problems
from pimerge.core.patterns import matches

_NESTED = ".base_layer"
Keys = dict[str, dict[str, str]]


def bare_parameters(config: Mapping[str, Any], keys: Keys, shapes: Shapes, problems: Problems) -> dict[str, LoraModule]:
    """Take the bare parameters out of the keys by module and slot, and return their updates by name.

    A stacked parameter has one update for each of its matrices, named ``module.INDEX.parameter``.
    """
    targets = config.get("target_parameters") or []
    owners: dict[str, list[str]] = {}
    for name in sorted(keys, key=len, reverse=True):  # the innermost layer first
        owners.setdefault(name.removesuffix(_NESTED * name.count(_NESTED)), []).append(name)
    found: dict[str, LoraModule] = {}
    for owner, layers in owners.items():
        if not targets or (len(layers) == 1 and _is_layer(owner, config, targets)):
            continue
        names = _named(owner, len(layers), targets, problems)
        for name, layer in zip(names, layers, strict=False):
            if module := _updates(BareParameter(owner, name, 1, 0), keys[layer], config, shapes, problems):
                found |= module
        for layer in layers:
            del keys[layer]
    if any(isinstance(module, SlicedModule) and module.rank > 1 for module in found.values()):
        _require_known_order(config, problems)
    return found


def _is_layer(owner: str, config: Mapping[str, Any], targets: list[str]) -> bool:
    """Whether PEFT adapted the module as a layer, not one of its parameters."""
    modules = config.get("target_modules") or []
    if isinstance(modules, str):
        is_target = matches(modules, owner)
    else:
        is_target = any(f".{owner}".endswith(f".{name}") for name in modules)
    return is_target or not _candidates(owner, targets)


def _candidates(owner: str, targets: list[str]) -> dict[str, bool]:
    """Parameter of a module that the targets can mean → whether a target also names the module."""
    found: dict[str, bool] = {}
    for target in targets:
        module, _, name = target.rpartition(".")
        if not module or f".{owner}".endswith(f".{module}"):
            found[name] = found.get(name, False) or bool(module)
    return found


def _named(owner: str, count: int, targets: list[str], problems: Problems) -> list[str]:
    """The names of the parameters that a module's layers adapt, from the innermost to the outermost."""
    candidates = _candidates(owner, targets)
    for names in (list(candidates), [name for name, with_module in candidates.items() if with_module]):
        if len(names) == count:
            if (order := nesting(names)) is not None:
                return order
            problems.add(
                f"module '{owner}': PEFT nests its parameters {', '.join(sorted(names))} in the order of the base's "
                "code, which is not known",
                "train one adapter for each parameter, or merge them with PEFT",
            )
            return []
    problems.add(
        f"module '{owner}' has {count} updates of parameters, but target_parameters means "
        f"{', '.join(sorted(candidates)) or 'none of its parameters'}",
        f"name its parameters in full in target_parameters of adapter_config.json, such as '{owner}.weight'",
    )
    return []


def _updates(
    parameter: BareParameter, keys: Mapping[str, str], config: Mapping[str, Any], shapes: Shapes, problems: Problems
) -> dict[str, LoraModule]:
    """The updates of one parameter by name; none, with a problem added, if its tensors do not fit each other."""
    full = parameter.full_name
    if set(keys) != {"A", "B"}:
        problems.add(f"parameter '{full}' has {', '.join(sorted(keys))}, expected A and B", "save the adapter again")
        return {}
    shape_A, shape_B = shapes[keys["A"]], shapes[keys["B"]]
    rank = int(pattern_value(config.get("rank_pattern") or {}, full, config.get("r", 8)))
    if len(shape_A) != 2 or len(shape_B) != 2 or 0 in (*shape_A, *shape_B) or shape_B[1] != shape_A[0]:
        problems.add(
            f"parameter '{full}': A is {shape_A} and B is {shape_B}, expected (matrices · r, d_in) and "
            "(d_out, r · matrices)",
            "save the adapter again",
        )
        return {}
    if rank < 1 or shape_A[0] % rank:
        problems.add(
            f"parameter '{full}': A has {shape_A[0]} rows, which is not a multiple of the rank {rank} in "
            "adapter_config.json",
            "the config belongs to another adapter; save both together",
        )
        return {}
    alpha = float(pattern_value(config.get("alpha_pattern") or {}, full, config.get("lora_alpha", 8)))
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    count = shape_A[0] // rank
    form = (rank, alpha, scaling, "linear" if count == 1 else f"one of {count} matrices")
    form_A, form_B = (rank, shape_A[1]), (shape_B[0], rank)
    if count == 1:
        name = parameter.module if parameter.name == "weight" else full
        return {name: LoraModule(name, keys["A"], keys["B"], None, *form, form_A, form_B, parameter=parameter)}
    by_expert = ORDERS.get(str(config.get(ORDER_FIELD))) is ExpertOrder.EXPERT
    found: dict[str, LoraModule] = {}
    for index in range(count):
        name = f"{parameter.module}.{index}.{parameter.name}"
        place = BareParameter(parameter.module, parameter.name, count, index)
        found[name] = SlicedModule(
            name, keys["A"], keys["B"], None, *form, form_A, form_B, parameter=place, by_expert=by_expert
        )
    return found


def _require_known_order(config: Mapping[str, Any], problems: Problems) -> None:
    """Add a problem if it is not known how the columns of B are stored."""
    stated = config.get(ORDER_FIELD)
    if stated is not None and stated not in ORDERS:
        problems.add(f"{ORDER_FIELD} in adapter_config.json is '{stated}'", f"expected {' or '.join(ORDERS)}")
    elif is_order_unknown(config):
        problems.add(
            "it was trained with Unsloth, which stored the updates of a mixture's experts by expert before version "
            f"2026.9.6 and by rank, as PEFT does, since then; adapter_config.json has no {ORDER_FIELD} that says which",
            "pass --expert-order expert or --expert-order rank to 'pimerge merge', which writes PEFT's order; or set "
            f"{ORDER_FIELD} to grouped_by_expert or rank_major there",
        )
