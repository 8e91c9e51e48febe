"""Kinds whose ΔW PEFT computes (``get_delta_weight``) from tensors of its own format.

An expert's tensors are compared with the layers that PEFT creates from its config, so every expert that PEFT reads is
accepted and any other is refused by name. PEFT is imported only when such an expert is opened.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from pimerge.adapters.computed_module import ComputedModule
from pimerge.adapters.keys import PREFIX, base_biases, key_of_parameter, sort_keys
from pimerge.adapters.kind import AdapterHeader, Kind, Parts, Shapes
from pimerge.adapters.peft_layers import PeftDelta, PeftLayers
from pimerge.core.errors import PimergeError, Problems

if TYPE_CHECKING:
    from torch import nn

BASE_HINT = "pass --base with the folder of the base that it was trained on"
CONVOLUTION = (
    "it adapts a convolution, whose shape only the base knows, and the base is not on this machine or has no such layer"
)
# Fields that say which modules are adapted or how they were trained; PEFT's layers are created without them.
_DROPPED = frozenset(
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules
    exclude_modules modules_to_save layers_to_transform layers_pattern bias fan_in_fan_out runtime_config""".split()  # noqa: SIM905
)


def peft_kind(how: PeftDelta, **fields: Any) -> Kind:
    """A kind whose ΔW PEFT computes as ``how`` describes; the other arguments are fields of :class:`Kind`."""
    usual: dict[str, Any] = {
        "peft_type": how.peft_type,
        "parse": partial(_parse, how),
        "slots": (how.slots,),
        "key_of_parameter": partial(_key_of_parameter, how.trained),
        "has_update": True,
        "reads_base": True,
        "usual_places": lora_places,
    }
    return Kind(**usual | fields)


def _key_of_parameter(shared: Sequence[str], name: str) -> str:
    """The key of a parameter; PEFT's model holds a tensor that all layers share in the first layer.

    >>> _key_of_parameter(["vblora_vector_bank"], "base_model.model.q.vblora_vector_bank.default")
    'base_model.vblora_vector_bank'
    """
    return next((f"base_model.{slot}" for slot in shared if f".{slot}." in name), key_of_parameter(name))


def fresh_fields(size: int | None, modules: Sequence[str] | None, name: str = "r", **more: Any) -> dict[str, Any]:
    """Fields of PEFT's config for a fresh expert.

    Args:
        name: the field for the size.
        more: further fields.

    >>> fresh_fields(4, ["q"])
    {'init_weights': True, 'r': 4, 'target_modules': ['q']}
    """
    sizes = {name: size} if size is not None else {}
    return {"init_weights": True, **sizes, **({"target_modules": list(modules)} if modules else {}), **more}


def lora_places(model: nn.Module) -> dict[str, Any]:
    """The modules of a fresh expert if none are named: the default targets of LoRA."""
    from pimerge.checkpoints.architecture import lora_targets  # imports torch

    return {"target_modules": lora_targets(model)}


def _parse(how: PeftDelta, header: AdapterHeader) -> Parts:
    """Read the modules and the head; PEFT's layers of this config must have tensors of exactly these shapes."""
    problems = Problems()
    refused = f"this {how.peft_type} adapter cannot be used"
    fields = _fields(how, header.config, problems)
    shared = {key.removeprefix("base_model."): key for key in header.shapes if not key.startswith(PREFIX)}
    with problems.collected():
        how.require(header.shapes)
    repeated = tuple(f".{slot}" for slot in shared)  # PEFT may write shared tensors again for every layer
    others = base_biases(header.config, header.shapes)
    own = {k: shape for k, shape in header.shapes.items() if k not in others and not k.endswith(repeated or "\0")}
    pattern = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+?)\.(?P<slot>{how.slots}\w*(?:\.\w+)*)")

    def slot_of(key: str) -> tuple[str, str] | None:
        match = pattern.fullmatch(key)
        return (match["module"], match["slot"]) if match else None

    keys, head = sort_keys(header.config, own, slot_of, f"tensors of {how.peft_type}", problems)
    if how.needs_weight(fields) and not header.convert:
        problems.add(
            f"its ΔW depends on the base's weights ({how.peft_type})",
            "'pimerge merge --base BASE' reads them, converts the expert and merges it",
        )
    shapes = {name: {slot: header.shapes[key] for slot, key in sorted(keys[name].items())} for name in sorted(keys)}
    weights: Shapes = {}
    with problems.collected():
        weights = _weights(how, header, shapes)
    problems.raise_any(refused)
    used = sorted({*shared.values(), *(key for slots in keys.values() for key in slots.values())})
    layers = PeftLayers(how, json.dumps(fields, sort_keys=True), tuple(weights.items()), tuple(used))
    layers.check({key: header.shapes[key] for key in used}, problems)
    problems.raise_any(refused)
    modules = {}
    for name, own_shapes in shapes.items():
        d_out, *inputs = weights[name]
        rank = min(d_out, math.prod(inputs), how.rank(own_shapes) or d_out) or 1
        kernel = inputs[1:]
        modules[name] = ComputedModule(
            name=name,
            A=f"{PREFIX}{name}.lora_A.weight",
            B=f"{PREFIX}{name}.lora_B.weight",
            bias=None,
            rank=rank,
            alpha=1.0,
            scaling=1.0,
            layer="conv" if kernel else "linear",
            shape_A=(rank, *inputs),
            shape_B=(d_out, rank, *(1 for _ in kernel)),
            conversions=(how.peft_type,) if how.needs_weight(fields) else (),
            slots={slot: key for slot, key in sorted(keys[name].items()) if slot not in how.fixed},
            shapes={slot: shape for slot, shape in own_shapes.items() if slot not in how.fixed},
            shared=tuple(shared[slot] for slot in how.trained if slot in shared),
            dense=partial(layers.dense, name),
        )
    return modules, head


def _weights(how: PeftDelta, header: AdapterHeader, shapes: Mapping[str, Shapes]) -> Shapes:
    """The shape of the base's weight of each module, from the base or from the adapter's own tensors."""
    if how.weight is None:
        found = header.layers(list(shapes))
        return {name: tuple(found[name]) for name in shapes}
    base: Shapes = {}
    with suppress(PimergeError):
        base = header.layers(list(shapes))
    problems, found = Problems(), {}
    for name, own in shapes.items():
        with problems.collected(f"module '{name}': "):
            try:
                found[name] = tuple(base.get(name) or how.weight(own))
            except (LookupError, ValueError) as error:
                raise PimergeError(
                    f"its tensors {dict(own)} do not determine the shape of its layer", BASE_HINT
                ) from error
    problems.raise_any("shapes of the layers")
    return found


def _fields(how: PeftDelta, config: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """The fields with which PEFT's layers are created; a field that is unknown or has a wrong type is a problem."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, __version__

    from pimerge.adapters.kinds._config_fields import CommonFields, faulty_fields

    if how.peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise PimergeError(f"PEFT {__version__} does not have the kind {how.peft_type}", f"install peft>={how.since}")
    known = {each.name: each.default for each in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[how.peft_type])}
    faulty = faulty_fields(CommonFields, config, problems)
    given = {name: value for name, value in config.items() if name not in faulty | _DROPPED and value is not None}
    for name, value in sorted(given.items()):
        is_number = isinstance(value, int | float) and math.isfinite(value)
        if name not in known and value:
            problems.add(
                f"'{name}' in adapter_config.json is not known to PEFT {__version__}",
                "if the field does not change the meaning of the tensors, set it to null; or install a newer PEFT",
            )
        elif type(known.get(name)) in (int, float) and not is_number:
            problems.add(f"{name} in adapter_config.json: expected a number; got {value!r}", "save it again with PEFT")
    return {name: value for name, value in given.items() if name in known}
