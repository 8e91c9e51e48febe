"""Low-rank updates ΔW = s·B·A of Linear, Conv and Embedding layers (LoRA, arXiv 2106.09685).

Layout relied on by all that merge or compose: A is (r × d_in), B is (d_out × r), whatever the layer.
A convolution's kernel is folded into d_in; an embedding's A is (r × vocabulary). ``fan_in_fan_out``
(GPT-2's Conv1D) concerns how the base stores its weight, not the factors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pimerge.errors import Problems

if TYPE_CHECKING:
    from torch import Tensor

PEFT_TYPE = "LORA"
PREFIX = "base_model.model."

_FACTOR_KEY = re.compile(
    re.escape(PREFIX) + r"(?P<module>.+)\.(?:lora_(?P<factor>[AB])\.weight|lora_B\.(?P<bias>bias)"
    r"|lora_embedding_(?P<embedding>[AB]))"
)

# Fields of adapter_config.json that change what the tensors mean, and why pimerge does not merge them.
_NOT_LINEAR = {
    "use_dora": "DoRA rescales the columns of W0 + ΔW, which is not linear in (B, A)",
    "use_qalora": "QA-LoRA pools the input before A",
    "use_bdlora": "BD-LoRA keeps its factors in blocks",
    "alora_invocation_tokens": "aLoRA is active only after its invocation tokens",
    "arrow_config": "Arrow routes each token to its own expert",
    "kasa_config": "KaSA changes the singular values of the base",
    "monteclora_config": "MonteCLoRA draws its factors at random",
    "velora_config": "VeLoRA changes what the layer computes in training",
    "layer_replication": "layer replication changes the base's layers",
    "target_parameters": "LoRA on bare parameters (target_parameters) has another layout",
    "trainable_token_indices": "trained tokens are no low-rank update",
    "megatron_config": "Megatron shards its factors",
}
_CHANGED_BASE = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "eva": "EVA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
_PLAIN_INITS = ("gaussian", "orthogonal", "mica")
_CONVERT = (
    "save it from PEFT as plain LoRA (model.save_pretrained with path_initial_model_for_weight_conversion); "
    "or, if the base is the published one, set init_lora_weights to true in adapter_config.json"
)
# Fields that say where the factors sit or how they were trained; the tensors themselves tell the rest.
_HARMLESS = frozenset(
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r
    target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save
    init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core loftq_config
    eva_config corda_config lora_ga_config qalora_group_size runtime_config lora_bias
    ensure_weight_tying""".split()  # noqa: SIM905
)


class _Fields(BaseModel):
    """The fields of ``adapter_config.json`` that are read, with their types."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    lora_bias: bool | None = None
    fan_in_fan_out: bool | None = None
    bias: str | None = None
    init_lora_weights: bool | str | None = None
    modules_to_save: list[str] | None = None


@dataclass(frozen=True)
class LoraModule:
    """Where one module's update lies in the adapter file, and its scaling.

    Attributes:
        name: the module's full name in the base model.
        A, B, bias: keys of the tensors; ``bias`` is None without ``lora_bias``.
        scaling: s = alpha / r, or alpha / √r with rsLoRA.
        layer: ``linear``, ``embedding`` or ``conv``.
        shape_A, shape_B: shapes as stored.
    """

    name: str
    A: str
    B: str
    bias: str | None
    rank: int
    alpha: float
    scaling: float
    layer: str
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]

    @property
    def d_in(self) -> int:
        """Inputs of ΔW, a convolution's kernel included."""
        return math.prod(self.shape_A[1:])

    @property
    def d_out(self) -> int:
        """Outputs of ΔW."""
        return self.shape_B[0]


@dataclass(frozen=True)
class Factors:
    """One module's update ΔW = scaling · B A, and its bias update scaling · bias.

    Attributes:
        A: (r × d_in).
        B: (d_out × r).
        bias: (d_out) or None.
    """

    A: Tensor
    B: Tensor
    scaling: float
    bias: Tensor | None = None


def parse(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, LoraModule], dict[str, str]]:
    """Read the layout of a LoRA expert.

    Args:
        config: the content of ``adapter_config.json``.
        shapes: the shape of each tensor of ``adapter_model.safetensors``.

    Returns:
        module name → its update, in alphabetical order; and the head's parameter name in the base model →
        its key (``modules_to_save``).

    Raises:
        PimergeError: with all that is wrong or cannot be handled, by name.

    >>> modules, head = parse({"r": 2, "lora_alpha": 4}, {
    ...     "base_model.model.q.lora_A.weight": (2, 8), "base_model.model.q.lora_B.weight": (6, 2)})
    >>> modules["q"].scaling, modules["q"].d_out, head
    (2.0, 6, {})
    """
    problems = Problems()
    config = _well_typed(config, problems)
    _refuse_unhandled(config, problems)
    keys, head = _sort_keys(config, shapes, problems)
    modules = {}
    for name in sorted(keys):
        module = _module(name, keys[name], config, shapes, problems)
        if module is not None:
            modules[name] = module
    if not keys and not problems.found:
        problems.add("it holds no LoRA factors", "save the adapter again: model.save_pretrained(FOLDER)")
    problems.raise_any("this LoRA cannot be used")
    return modules, head


def factors(module: LoraModule, read: Callable[[str], Tensor]) -> Factors:
    """The factors of one module in the common layout; ``read`` gives the tensor of a key."""
    A, B = read(module.A), read(module.B)
    return Factors(
        A.reshape(A.shape[0], -1),
        B.reshape(B.shape[0], -1),
        module.scaling,
        read(module.bias) if module.bias else None,
    )


def stored(module: LoraModule, merged: Factors) -> dict[str, Tensor]:
    """The tensors of one module as PEFT stores them: the inverse of :func:`factors` for scaling 1."""
    rank = merged.A.shape[0]
    tensors = {
        module.A: merged.A.reshape(rank, *module.shape_A[1:]).contiguous(),
        module.B: merged.B.reshape(merged.B.shape[0], rank, *module.shape_B[2:]).contiguous(),
    }
    if merged.bias is not None:
        tensors[f"{PREFIX}{module.name}.lora_B.bias"] = merged.bias.contiguous()
    return tensors


def key_of_parameter(name: str) -> str:
    """The adapter file's key for the name of a parameter of PEFT's model with adapter ``default``.

    >>> key_of_parameter("base_model.model.q.lora_A.default.weight")
    'base_model.model.q.lora_A.weight'
    """
    return re.sub(r"(\.lora_(?:embedding_)?[AB])\.default", r"\1", name)


def is_B_factor(key: str) -> bool:
    """Whether a key names the factor B, whose Fisher tells tasks apart best.

    >>> [is_B_factor(f"base_model.model.q.lora_{end}") for end in ("B.weight", "A.weight", "B.bias")]
    [True, False, False]
    """
    return key.endswith((".lora_B.weight", ".lora_embedding_B"))


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """What ``rank_pattern`` or ``alpha_pattern`` says of a module: the first key that matches its end.

    >>> pattern_value({"q_proj": 4}, "layers.0.q_proj", 8), pattern_value({"proj": 4}, "layers.0.q_proj", 8)
    (4, 8)
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _well_typed(config: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """The config without the fields of a wrong type, which are problems."""
    faulty = set()
    try:
        _Fields.model_validate(config)
    except ValidationError as error:
        for fault in error.errors():
            faulty.add(fault["loc"][0])
            where = ".".join(str(part) for part in fault["loc"])
            problems.add(f"{where} in adapter_config.json: {fault['msg']}", "save the adapter again with PEFT")
    for field in {"rank_pattern", "alpha_pattern"} - faulty:
        for key in config.get(field) or {}:
            try:
                re.compile(key)
            except re.error as error:
                faulty.add(field)
                problems.add(f"{field} in adapter_config.json: '{key}' is no regular expression ({error})")
    return {field: value for field, value in config.items() if field not in faulty}


def _refuse_unhandled(config: Mapping[str, Any], problems: Problems) -> None:
    for field, reason in _NOT_LINEAR.items():
        if config.get(field):
            problems.add(f"{field} is on: {reason}", "merge it into a base of its own, or train plain LoRA")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        method = next((method for start, method in _CHANGED_BASE.items() if init.lower().startswith(start)), init)
        problems.add(
            f"init_lora_weights is '{init}': {method} is refused, since its factors may belong to a "
            "base that it changed, not to the base as published",
            _CONVERT,
        )
    if (config.get("bias") or "none") != "none":
        problems.add(
            f"bias is '{config['bias']}': trained biases of the base are no update that can be added",
            "train with bias='none'; lora_bias=True is handled",
        )
    for field in sorted(set(config) - _HARMLESS - set(_NOT_LINEAR)):
        if config[field]:
            problems.add(
                f"'{field}' in adapter_config.json is not known to this version of pimerge",
                "if the field does not change what the tensors mean, set it to null",
            )


def _sort_keys(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], problems: Problems
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Factor keys by module, and head keys; every other key is a problem."""
    saved = config.get("modules_to_save") or []
    keys: dict[str, dict[str, str]] = {}
    head, unknown = {}, []
    for key in sorted(shapes):
        if match := _FACTOR_KEY.fullmatch(key):
            slot = match["factor"] or match["embedding"] or match["bias"]
            keys.setdefault(match["module"], {})[slot] = key
            continue
        name = key.removeprefix(PREFIX)
        if name != key and any(f".{saved_name}." in f".{name}" for saved_name in saved):
            head[name] = key
        else:
            unknown.append(key)
    if unknown:
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        problems.add(
            f"tensors that are neither LoRA factors nor in modules_to_save: {shown}",
            "save the adapter with PEFT (for embeddings: save_embedding_layers=False); nothing is dropped in silence",
        )
    return keys, head


def _module(
    name: str,
    keys: Mapping[str, str],
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    problems: Problems,
) -> LoraModule | None:
    missing = {"A", "B"} - set(keys)
    if missing:
        problems.add(f"module '{name}' has no factor {' and '.join(sorted(missing))}", "save the adapter again")
        return None
    shape_A, shape_B = shapes[keys["A"]], shapes[keys["B"]]
    rank = shape_A[0] if shape_A else 0
    empty = 0 in (*shape_A, *shape_B)
    if len(shape_A) < 2 or len(shape_B) < 2 or empty or shape_B[1] != rank:
        problems.add(
            f"module '{name}': A is {shape_A} and B is {shape_B}, expected (r, d_in, …) and (d_out, r, …)",
            "a grouped convolution is not handled; otherwise save the adapter again",
        )
        return None
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
    return LoraModule(
        name, keys["A"], keys["B"], bias, rank, float(alpha), scaling, layer, tuple(shape_A), tuple(shape_B)
    )
