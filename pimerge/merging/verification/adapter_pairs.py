"""Pair the updates of a merged adapter with those of the experts, for which no base is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from pimerge.adapters.expert import Expert
from pimerge.adapters.lora_module import Factors
from pimerge.merging.tensor_merge import base_reader
from pimerge.merging.verification.base_values import Read
from pimerge.merging.verification.compared_tensor import LowRank, Part
from pimerge.merging.verification.held import pair_biases, pair_embeddings, pair_tensor_sets
from pimerge.merging.verification.sources import Pairing, bias_update_of, layouts_of, scaling_of, update_of


def pair_adapters(merged: Expert, experts: Sequence[Expert], read: Read, weights: Sequence[float]) -> Pairing:
    """Pair the updates module by module; names with and without the backbone's prefix are the same module.

    Biases, embeddings and kinds without ΔW are paired tensor by tensor.
    """
    base = base_reader(experts[0].base)
    if merged.tensor_sets and all(expert.tensor_sets for expert in experts):
        return pair_tensor_sets(merged, experts, weights, base)
    pairing = Pairing()
    theirs = {name for expert in experts for name in expert.modules}
    own = {_same_module(name, theirs): name for name in merged.modules}
    renamed = replace(merged, modules={name: merged.modules[stored] for name, stored in own.items()})

    def read_own(expert: Expert, name: str) -> Factors:
        return read(merged, own[name]) if expert is renamed else read(expert, name)

    sources = [renamed, *experts]
    for name in layouts_of(sources, any_vocabulary=True):
        scalings = [scaling_of(expert, name) for expert in experts]
        own_layouts = [expert.modules[name] for expert in sources if name in expert.modules]
        d_out, d_in = (min(sizes) for sizes in zip(*((each.d_out, each.d_in) for each in own_layouts), strict=True))
        if any((each.d_out, each.d_in) != (d_out, d_in) for each in own_layouts):
            pairing.remarks.append(f"the further tokens of '{name}' that not all have are not part of the claim")
        parts = [partial(_common, partial(update_of, expert, name, read_own, False), d_out, d_in) for expert in sources]
        pairing.add(name, (d_out, d_in), None, parts)
        pairing.scalings[name] = scalings
        is_trained = any(f"{name}.bias" in expert.biases for expert in sources)
        if not is_trained and any(name in expert.modules and expert.modules[name].bias for expert in sources):
            biases = [partial(bias_update_of, expert, name, read_own) for expert in sources]
            pairing.add(f"{name}.bias", (d_out, 1), None, biases)
            pairing.scalings[f"{name}.bias"] = scalings
    pair_biases(pairing, sources, read_own, weights, base)
    pair_embeddings(pairing, sources, weights, base)
    return pairing


def _common(read: Callable[[], Part | None], rows: int, columns: int) -> Part | None:
    """The update of the tokens that all adapters have."""
    part = read()
    if not isinstance(part, LowRank):
        return part
    return replace(part, left=part.left[:rows], right=part.right[:, :columns])


def _same_module(name: str, others: Iterable[str]) -> str:
    """The other name of a module, if exactly one differs only by a prefix; else its own name.

    >>> _same_module("layers.0.q", {"vit.layers.0.q", "vit.layers.0.v"}), _same_module("q", {"a.q", "b.q"})
    ('vit.layers.0.q', 'q')
    """
    if name in (others := set(others)):
        return name
    found = [other for other in others if other.endswith(f".{name}") or name.endswith(f".{other}")]
    return found[0] if len(found) == 1 else name
