"""Check ``adapter_config.json`` of a LoRA: types of its fields, and fields that change the meaning of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pimerge.adapters.kinds._config_fields import CommonFields, faulty_fields
from pimerge.adapters.lora_module import DORA, OLORA, PISSA
from pimerge.core.errors import Problems

# Fields that change the meaning of the tensors, and why pimerge does not merge them.
_NOT_LINEAR = {
    "use_qalora": "QA-LoRA pools the input before A",
    "use_bdlora": "BD-LoRA keeps its factors in blocks",
    "alora_invocation_tokens": "aLoRA is active only after its invocation tokens",
    "arrow_config": "Arrow routes each token to its own expert",
    "kasa_config": "KaSA changes the singular values of the base",
    "monteclora_config": "MonteCLoRA samples its factors at random",
    "velora_config": "VeLoRA changes the computation of the layer in training",
    "layer_replication": "layer replication changes the base's layers",
    "trainable_token_indices": "trained tokens are not a low-rank update",
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
CONVERTED_INITS = {"pissa": PISSA, "olora": OLORA}
_PLAIN_INITS = ("gaussian", "orthogonal", "mica")
_DORA_REASON = "DoRA rescales the rows of W0 + ΔW, which is not linear in B and A"
_MERGE = "'pimerge merge --base BASE' converts it with the base's weights and merges it; otherwise train plain LoRA"
_CONVERT = (
    "save it from PEFT as plain LoRA (model.save_pretrained with path_initial_model_for_weight_conversion); "
    "or, if the base is the published one, set init_lora_weights to true in adapter_config.json"
)
# Fields that say which modules are adapted or how they were trained, or that the tensors themselves determine.
_HARMLESS = frozenset(
    """use_dora task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r
    target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save
    init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core loftq_config
    eva_config corda_config lora_ga_config qalora_group_size runtime_config lora_bias
    ensure_weight_tying target_parameters lora_B_layout""".split()  # noqa: SIM905
)


class _LoraFields(CommonFields):
    """The fields that are read, with their types."""

    r: int = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    lora_bias: bool | None = None
    fan_in_fan_out: bool | None = None
    bias: str | None = None
    init_lora_weights: bool | str | None = None
    target_parameters: list[str] | None = None


def well_typed(config: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """Return the config without the fields of a wrong type, and add a problem for each of them."""
    faulty = faulty_fields(_LoraFields, config, problems)
    for field in {"rank_pattern", "alpha_pattern"} - faulty:
        for key in config.get(field) or {}:
            try:
                re.compile(key)
            except re.error as error:
                faulty.add(field)
                problems.add(f"{field} in adapter_config.json: '{key}' is not a regular expression ({error})")
    return {field: value for field, value in config.items() if field not in faulty}


def conversions_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The variants that have to be converted to plain LoRA with the base's weights: ``DoRA``, ``PiSSA``, ``OLoRA``.

    >>> conversions_of({"use_dora": True, "init_lora_weights": "pissa"})
    ('PiSSA', 'DoRA')
    """
    init = config.get("init_lora_weights")
    start = CONVERTED_INITS.get(init.lower()) if isinstance(init, str) else None
    return (*([start] if start else []), *([DORA] if config.get("use_dora") else []))


def refuse_unhandled(config: Mapping[str, Any], problems: Problems, *, convert: bool) -> None:
    """Add a problem for every field that changes the meaning of the tensors.

    Args:
        convert: whether to accept DoRA, PiSSA and OLoRA, which will be converted.
    """
    if config.get("use_dora") and not convert:
        problems.add(f"use_dora is on: {_DORA_REASON}", _MERGE)
    for field, reason in _NOT_LINEAR.items():
        if config.get(field):
            problems.add(f"{field} is on: {reason}", "merge it into a base of its own, or train plain LoRA")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() in CONVERTED_INITS and not convert:
        method = CONVERTED_INITS[init.lower()]
        problems.add(
            f"init_lora_weights is '{init}': {method} is refused, since its factors belong to a base that it "
            "changed, not to the base as published",
            f"{_MERGE}; or {_CONVERT}",
        )
    elif isinstance(init, str) and init.lower() not in (*_PLAIN_INITS, *CONVERTED_INITS):
        method = next((method for start, method in _CHANGED_BASE.items() if init.lower().startswith(start)), init)
        problems.add(
            f"init_lora_weights is '{init}': {method} is refused, since its factors may belong to a "
            "base that it changed, not to the base as published",
            _CONVERT,
        )
    if (config.get("bias") or "none") != "none":
        problems.add(
            f"bias is '{config['bias']}': trained biases of the base are not an update that can be added",
            "train with bias='none'; lora_bias=True is accepted",
        )
    for field in sorted(set(config) - _HARMLESS - set(_NOT_LINEAR)):
        if config[field]:
            problems.add(
                f"'{field}' in adapter_config.json is not known to this version of pimerge",
                "if the field does not change the meaning of the tensors, set it to null",
            )
