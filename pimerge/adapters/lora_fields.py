"""The fields of PEFT's config that select the modules of a LoRA and their ranks.

PEFT adapts a module if its name is in the list ``target_modules``, or ends with an entry of it after a dot; if
``target_modules`` is a string, the whole name must match it as a regular expression. The rank is that of the first
entry of ``rank_pattern`` that matches the name, or its ending after a dot, as a regular expression.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any

from pimerge.adapters.keys import ATTENTION_OUTPUT

_FUSED = re.compile(r"\.experts\.\d+\.|\.gate$")
"""Experts and routers of a mixture of experts, which PEFT moves to fused parameters without their ``rank_pattern``."""


def ranks_to_write(ranks: Mapping[str, int]) -> dict[str, int]:
    """The ranks to which the factors of modules are padded with zeros.

    The experts and routers of a mixture of experts get one rank: PEFT moves them to fused parameters when it loads
    them, and there only the rank in the field ``r`` holds. So do the input and output projections of a
    ``torch.nn.MultiheadAttention``, which PEFT adapts together.

    >>> ranks_to_write({"mlp.experts.0.w1": 4, "mlp.gate": 2, "q": 3})
    {'mlp.experts.0.w1': 4, 'mlp.gate': 4, 'q': 3}
    """
    common = max((rank for name, rank in ranks.items() if is_fused(name)), default=0)
    found = {name: common if is_fused(name) else rank for name, rank in ranks.items()}
    for name in ranks:
        attention = name.removesuffix(ATTENTION_OUTPUT)
        if attention != name and attention in found:
            found[name] = found[attention] = max(found[name], found[attention])
    return found


def is_fused(name: str) -> bool:
    """Whether PEFT moves a module to fused parameters, where ``rank_pattern`` and ``alpha_pattern`` do not hold."""
    return _FUSED.search(name) is not None


def rank_fields(
    ranks: Mapping[str, int],
    others: Iterable[str] = (),
    parameters: Container[str] = (),
    scalings: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Fields of PEFT's config for a LoRA with these modules and ranks.

    Args:
        others: names of the base's modules, as far as they are known; only those in ``ranks`` are adapted.
        parameters: the names that are bare parameters (``target_parameters``) and not modules.
        scalings: scaling of each module; 1 by default.

    >>> rank_fields({"q": 2, "v": 4, "k": 2})
    {'r': 2, 'rank_pattern': {'k': 2, 'q': 2, 'v': 4}, 'lora_alpha': 2, 'alpha_pattern': {'k': 2, 'q': 2, 'v': 4}, \
'target_modules': ['k', 'q', 'v']}
    >>> rank_fields({"q": 2, "v": 2}, scalings={"q": 1.5, "v": 1.5})
    {'r': 2, 'rank_pattern': {}, 'lora_alpha': 3, 'alpha_pattern': {}, 'target_modules': ['q', 'v']}
    """
    alphas = {name: _alpha((scalings or {}).get(name, 1.0), rank) for name, rank in ranks.items()}
    names = sorted(ranks, key=lambda name: (-len(name), name))
    fields: dict[str, Any] = {}
    for field, pattern, given in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
        fused = [value for name, value in given.items() if is_fused(name)]
        fields[field] = Counter(fused or given.values()).most_common(1)[0][0] if given else 1
        # all names are listed, the longer ones first, since one name can be the ending of another
        differ = len(set(given.values())) > 1
        fields[pattern] = {re.escape(name): given[name] for name in names} if differ else {}
    layers = {name: rank for name, rank in ranks.items() if name not in parameters}
    bare = sorted(ranks.keys() - layers.keys())
    return {**fields, "target_modules": _targets(layers, others), **({"target_parameters": bare} if bare else {})}


def _alpha(scaling: float, rank: int) -> float:
    """The ``lora_alpha`` of a scaling: an integer where it gives the same scaling, as PEFT's own configs have.

    >>> _alpha(16 / 3, 3), _alpha(0.3, 3)
    (16, 0.8999999999999999)
    """
    alpha = scaling * rank
    return round(alpha) if round(alpha) / rank == scaling else alpha


def _targets(names: Mapping[str, int], others: Iterable[str]) -> list[str] | str:
    """The names, or a regular expression if another module of the base ends with one of them.

    >>> _targets({"0": 1}, ["0", "mlp.0"]), _targets({"mlp.0": 1}, ["0", "mlp.0"])
    ('0', ['mlp.0'])
    """
    known = set(others)
    if known & names.keys() and any(_ends_with_one(other, names) for other in known - names.keys()):
        return "|".join(re.escape(name) for name in sorted(names))
    return sorted(names)


def _ends_with_one(other: str, names: Mapping[str, int]) -> bool:
    while "." in other:
        other = other.partition(".")[2]
        if other in names:
            return True
    return False
