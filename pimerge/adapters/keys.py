"""Key names that all kinds share."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from pimerge.core.errors import Problems

PREFIX = "base_model.model."
"""Prefix of parameter names in PEFT's model; prompts and prefixes, which do not change modules, have another."""
PROMPT_PREFIX = "base_model."
ATTENTION_OUTPUT = ".base_layer.out_proj"
"""End of the name of a ``torch.nn.MultiheadAttention``'s output projection, which PEFT adapts with the input's."""
_EMBEDDINGS = frozenset(
    """embed_tokens word_embeddings tok_embeddings wte shared embed_in embedding embeddings lm_head embed_out proj_out
    output output_layer""".split()  # noqa: SIM905
)

OF_TOKENS = frozenset("embed_tokens word_embeddings wte shared lm_head embed_out tok_embeddings".split())  # noqa: SIM905
"""Names of embeddings and output layers, whose vocabulary may have been resized."""


def key_of_parameter(name: str) -> str:
    """The adapter file's key of a parameter of PEFT's model with adapter ``default``.

    >>> key_of_parameter("base_model.model.q.lora_A.default.weight")
    'base_model.model.q.lora_A.weight'
    >>> key_of_parameter("base_model.model.q.hada_w1_a.default")
    'base_model.model.q.hada_w1_a'
    """
    return re.sub(r"\.default(?=\.(?:weight|bias)$|$)", "", name)


def is_saved(name: str, saved: Iterable[str]) -> bool:
    """Whether a parameter of the base belongs to ``modules_to_save``.

    As PEFT's ``_set_trainable`` has it: every module whose full name ends with an entry, even within a word.

    >>> is_saved("pre_classifier.weight", ["classifier"]), is_saved("classifier_2.weight", ["classifier"])
    (True, False)
    """
    return any(f"{entry}." in name for entry in saved)


TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
"""End of the name of trained rows of an embedding (``trainable_token_indices``), which replace the base's."""


def parameter_of(name: str) -> str:
    """The base's parameter of a head's tensor; PEFT moves an adapted layer's own weight into ``base_layer``.

    >>> parameter_of("lm_head.base_layer.weight")
    'lm_head.weight'
    """
    return re.sub(r"\.base_layer(?=\.(weight|bias)$)", "", name)


def is_saved_embedding(name: str, adapted: Container[str]) -> bool:
    """Whether a tensor is an embedding of the base, or its output layer, that PEFT saved beside the adapter.

    PEFT does so if the vocabulary was resized, if the layer is adapted (then with ``base_layer`` in the name), and with
    ``ensure_weight_tying``; when it loads the adapter, the tensor replaces the base's.

    Args:
        adapted: the modules that the adapter changes.

    >>> is_saved_embedding("model.embed_tokens.weight", ()), is_saved_embedding("q.base_layer.weight", ["q"])
    (True, True)
    """
    if name.endswith(TOKEN_ROWS):
        return True
    module = parameter_of(name).rpartition(".")[0]
    if parameter_of(name) != name:
        return module in adapted
    return name.endswith((".weight", ".bias")) and module.rpartition(".")[2] in _EMBEDDINGS


def is_of_model(name: str, saved: Iterable[str]) -> bool:
    """Whether a tensor of a head belongs to the model rather than to the task: embeddings and rows of them.

    Args:
        saved: the adapter's ``modules_to_save``.

    >>> is_of_model("lm_head.weight", ["lm_head"]), is_of_model("score.weight", ["score"])
    (True, False)
    """
    module = parameter_of(name).rpartition(".")[0]
    return name.endswith(TOKEN_ROWS) or module.rpartition(".")[2] in OF_TOKENS or not is_saved(name, saved)


def base_biases(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, str]:
    """Key → parameter name in the base, for the biases of the base that ``bias`` ("all" or "…_only") saves.

    >>> base_biases({"bias": "all"}, ["base_model.model.q.base_layer.bias", "base_model.model.q.lora_B.bias"])
    {'base_model.model.q.base_layer.bias': 'q.bias'}
    >>> base_biases({"bias": "none"}, ["base_model.model.q.bias"])
    {}
    """
    if (config.get("bias") or "none") == "none":
        return {}
    saved = config.get("modules_to_save") or []
    names = {key: key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in keys if key.endswith(".bias")}
    return {key: name for key, name in names.items() if ".lora_" not in name and not is_saved(name, saved)}


def sort_keys(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    slot_of: Callable[[str], tuple[str, str] | None],
    what: str,
    problems: Problems,
    prefix: str = PREFIX,
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Group the expert's keys by module and slot, and the head's by parameter name; any other key is a problem.

    Args:
        slot_of: key → (module, slot); None for a key that does not belong to the kind.
        what: name of the kind's tensors in messages.
    """
    saved = config.get("modules_to_save") or []
    keys: dict[str, dict[str, str]] = {}
    head, unknown = {}, []
    for key in sorted(shapes):
        if place := slot_of(key):
            keys.setdefault(place[0], {})[place[1]] = key
            continue
        name = key.removeprefix(prefix)
        if name != key and is_saved(name, saved):
            head[name] = key
        else:
            unknown.append(key)
    found = [key for key in unknown if is_saved_embedding(key.removeprefix(prefix), keys) and key.startswith(prefix)]
    head |= {key.removeprefix(prefix): key for key in found}
    unknown = [key for key in unknown if key not in found]
    if unknown:
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        problems.add(
            f"tensors that are neither {what} nor in modules_to_save: {shown}",
            "another library wrote them, or a version of PEFT that this version of pimerge does not know: they are "
            "not dropped, since they change the model",
        )
    if not keys and not problems.found:
        problems.add(f"it holds no {what}", "save the adapter again: model.save_pretrained(FOLDER)")
    return keys, head
