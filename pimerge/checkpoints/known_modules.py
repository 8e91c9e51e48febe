"""Find the names of a base's modules, with as little of it as will do."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from pimerge.checkpoints.base_modules import BaseModules
from pimerge.checkpoints.checkpoint import CONFIG, open_checkpoint, read_object
from pimerge.core.errors import PimergeError

PLAIN_TYPES = frozenset(
    """albert bart bert bigbird_pegasus bloom camembert codegen cohere ctrl deberta deberta-v2 distilbert electra
    ernie falcon funnel gemma gemma2 gpt2 gpt_bigcode gpt_neo gptj granite led llama longformer mbart mistral mpnet
    mpt mt5 olmo olmo2 opt pegasus phi phi3 qwen2 qwen3 roberta roformer smollm3 stablelm starcoder2 t5 umt5
    whisper xglm xlm-roberta xlm-roberta-xl xlnet""".split()  # noqa: SIM905
)
"""The ``model_type`` of models without renamed modules in any version; for others, transformers has to be asked."""
_ONE_AT_A_TIME = Lock()  # transformers builds its renamings on first use, which is not thread-safe


@cache
def known_modules(folder: Path) -> BaseModules | None:
    """Find the names of a base's modules; no weight is read. None if the folder does not tell.

    transformers is imported only for models some of whose modules it has renamed.
    """
    config: dict[str, Any] = {}
    try:
        config = read_object(folder / CONFIG)
    except PimergeError:
        return None
    if config.get("model_type") not in PLAIN_TYPES:
        with _ONE_AT_A_TIME:
            from pimerge.checkpoints.base_classes import modules_of_config  # imports torch

            known = modules_of_config(folder, config)
        if known is not None:
            return known
    try:
        keys = open_checkpoint(folder).home
    except PimergeError:
        return None
    modules = frozenset(key.rpartition(".")[0] for key in keys)
    firsts = Counter(name.partition(".")[0] for name in modules if "." in name)
    return BaseModules(modules, firsts.most_common(1)[0][0] if firsts else "")
