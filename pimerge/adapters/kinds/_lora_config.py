"""Check ``adapter_config.json`` of a LoRA: types of its fields, and fields that change the meaning of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pimerge.adapters.kinds._config_fields import CommonFields, faulty_fields
from pimerge.adapters.lora_module import DORA, KASA, OLORA, PISSA
from pimerge.core.errors import Problems

_TRAIN_PLAIN = "leave it out, or train plain LoRA"
# Fields that change the meaning of the tensors, why pimerge does not merge them, and what to do.
_REFUSED = {
    "alora_invocation_tokens": (
        "aLoRA is active only after its invocation tokens, so its update is not part of the weights",
        _TRAIN_PLAIN,
    ),
    "arrow_config": (
        "Arrow routes each token over several LoRAs by their similarity to the token",
        "merge the LoRAs that it routes over instead",
    ),
    "megatron_config": (
        "Megatron splits the factors over devices, and the file does not say whether it holds all of them",
        "gather them, save them with PEFT under the names of the base on the Hub, and set megatron_config to null",
    ),
    "enable_lora": (
        "it adapts parts of a fused projection, which PEFT has not loaded since version 0.3",
        "train it again with a present version of PEFT",
    ),
}
# Inits that replace the base by another one which cannot be computed again from the base and the file.
_CHANGED_BASE = {
    "pissa_niter": (
        "PiSSA",
        "a random SVD moved a part of the base into the factors, and another run finds another one",
    ),
    "corda": ("CorDA", "data that are not in the file decided which part of the base moved into the factors"),
    "lora_ga": ("LoRA-GA", "gradients that are not in the file decided what was subtracted from the base"),
    "loftq": ("LoftQ", "the factors correct a quantised base, not the base as published"),
}
CONVERTED_INITS = {"pissa": PISSA, "olora": OLORA}
_PLAIN_INITS = ("gaussian", "orthogonal", "mica", "eva")  # these leave the base as it is
_DORA_REASON = "DoRA rescales the rows of W0 + ΔW, which is not linear in B and A"
_KASA_REASON = "KaSA drops the smallest singular values of the base, which its update relies on"
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
    eva_config corda_config lora_ga_config qalora_group_size runtime_config lora_bias velora_config monteclora_config
    use_qalora use_bdlora kasa_config layer_replication merge_weights lora_dtype lorap_lr_ratio lorap_emb_lr
    ensure_weight_tying trainable_token_indices target_parameters lora_B_layout""".split()  # noqa: SIM905
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
    """The variants that have to be converted with the base's weights: ``DoRA``, ``PiSSA``, ``OLoRA``, ``KaSA``.

    >>> conversions_of({"use_dora": True, "init_lora_weights": "pissa"})
    ('PiSSA', 'DoRA')
    """
    init = config.get("init_lora_weights")
    start = CONVERTED_INITS.get(init.lower()) if isinstance(init, str) else None
    others = {KASA: config.get("kasa_config"), DORA: config.get("use_dora")}
    return (*([start] if start else []), *(name for name, is_on in others.items() if is_on))


def refuse_unhandled(config: Mapping[str, Any], problems: Problems, *, convert: bool) -> None:
    """Add a problem for every field that changes the meaning of the tensors.

    Args:
        convert: whether to accept DoRA, PiSSA, OLoRA and KaSA, which will be converted.
    """
    for field, reason in (("use_dora", _DORA_REASON), ("kasa_config", _KASA_REASON)):
        if config.get(field) and not convert:
            problems.add(f"{field} is on: {reason}", _MERGE)
    for field, (reason, hint) in _REFUSED.items():
        if config.get(field):
            problems.add(f"{field} is on: {reason}", hint)
    init = config.get("init_lora_weights", True)
    if isinstance(init, str):
        _refuse_init(init, problems, convert=convert)
    for field in sorted(set(config) - _HARMLESS - set(_REFUSED)):
        if config[field]:
            problems.add(
                f"'{field}' in adapter_config.json is not known to this version of pimerge",
                "if the field does not change the meaning of the tensors, set it to null",
            )


def _refuse_init(init: str, problems: Problems, *, convert: bool) -> None:
    """Add a problem for an init whose factors belong to a base that it changed."""
    found = init.lower()
    if found in _PLAIN_INITS or (convert and found in CONVERTED_INITS):
        return
    if found in CONVERTED_INITS:
        problems.add(
            f"init_lora_weights is '{init}': {CONVERTED_INITS[found]} is refused, since its factors belong to a base "
            "that it changed, not to the base as published",
            f"{_MERGE}; or {_CONVERT}",
        )
        return
    start = next((start for start in _CHANGED_BASE if found.startswith(start)), None)
    if start is None:
        problems.add(f"init_lora_weights is '{init}', which is not known to this version of pimerge", _CONVERT)
        return
    method, reason = _CHANGED_BASE[start]
    problems.add(
        f"init_lora_weights is '{init}': {method} is refused, since its factors belong to a base that it changed "
        f"({reason})",
        _CONVERT,
    )
