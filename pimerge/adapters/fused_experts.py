"""Updates of a mixture's experts under the names of earlier models, as matrices of the stacked parameters of today's.

Until version 5 of transformers, every expert of a mixture had layers of its own, such as ``experts.3.w1``. Today they
are stacked: ``gate_up_proj`` is (E, 2·d, d_in), with the rows of ``gate_proj`` (``w1``) above those of ``up_proj``
(``w3``), and ``down_proj`` (``w2``) is (E, d_out, d). The update of a matrix of ``gate_up_proj`` is

    ΔW = [s₁ B₁ A₁; s₃ B₃ A₃] = [[s₁ B₁, 0], [0, s₃ B₃]] [A₁; A₃]

of rank r₁ + r₃, which is exact. PEFT does the same when it loads such an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pimerge.adapters.lora_module import BareParameter, Factors, LoraModule
from pimerge.checkpoints.base import Base
from pimerge.core.errors import PimergeError, Problems

if TYPE_CHECKING:
    from torch import Tensor

_HALVES = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}
_WHOLE = ("down_proj", "w2")
_EXPERT = re.compile(rf"(?P<owner>.+\.experts)\.(?P<index>\d+)\.(?P<layer>{'|'.join([*_HALVES, *_WHOLE])})")
# Layers that PEFT takes for experts' by the ending of their name, wherever they are, if they are in target_modules.
_TAKEN = re.compile(rf".+\.({'|'.join([*_HALVES, *_WHOLE])})")
_FUSED, _DOWN = "gate_up_proj", "down_proj"
_BLOCK = (".block_sparse_moe.", ".mlp.")
Rename = Callable[[str], str | None]
"""Parameter of an earlier model → its name today; None where the base's model has none of that name."""


@dataclass(frozen=True)
class FusedModule(LoraModule):
    """The update of one matrix of ``gate_up_proj``, from those of two layers.

    Attributes:
        halves: the updates of the upper rows and of the lower rows; None where there is none.
    """

    is_plain: ClassVar[bool] = False
    halves: tuple[LoraModule | None, LoraModule | None] = (None, None)

    @property
    def key_of_slot(self) -> Mapping[str, str]:
        """Slot → key of each of its tensors."""
        return {f"{letter}{place}": key for place, half in self._present() for letter, key in half.key_of_slot.items()}

    def factors(self, read: Callable[[str], Tensor]) -> Factors:
        """Read its factors in the common layout; ``read`` reads the tensor of a key."""
        import torch

        parts = [(place, half, half.factors(read)) for place, half in self._present()]
        rows = self.d_out // 2
        kinds = [tensor.dtype for _, _, part in parts for tensor in (part.A, part.B)]
        kind = max(kinds, key=lambda dtype: torch.finfo(dtype).bits)
        alike = len({half.scaling for _, half, _ in parts}) == 1
        B = torch.zeros(self.d_out, self.rank, dtype=kind if alike else torch.promote_types(kind, torch.float32))
        start = 0
        for place, half, part in parts:
            factor = 1.0 if alike else half.scaling
            B[place * rows : (place + 1) * rows, start : start + half.rank] = part.B.to(B.dtype) * factor
            start += half.rank
        return Factors(torch.cat([part.A.to(kind) for _, _, part in parts]), B, self.scaling)

    def _present(self) -> list[tuple[int, LoraModule]]:
        return [(place, half) for place, half in enumerate(self.halves) if half is not None]


def fused(modules: Mapping[str, LoraModule], base: Callable[[], Base]) -> dict[str, LoraModule]:
    """Modules with the names of today's model, if some are layers of a mixture's experts; otherwise unchanged.

    Where the base is on this machine, transformers' own renaming decides. Otherwise, the names do: no model of today
    has layers of such names.

    Args:
        base: finds the base; called if it is needed.
    """
    found = {name: match for name in modules if (match := _EXPERT.fullmatch(name))}
    layers = [modules[name] for name in found]
    if not found or any(each.parameter or each.layer != "linear" or each.conversions for each in layers):
        return dict(modules)
    rename = _rename_of(base)
    counts: dict[str, int] = {}
    for match in found.values():
        counts[match["owner"]] = max(counts.get(match["owner"], 0), int(match["index"]) + 1)
    groups: dict[tuple[str, int, str], dict[str, LoraModule]] = {}
    for name, match in found.items():
        wholes = [] if match["layer"] in ("w1", "w3") else [match["layer"]]  # an expert without a gate
        leaves = [_FUSED, *wholes] if match["layer"] in _HALVES else [_DOWN]
        today = next(filter(None, (rename(f"{match['owner']}.{leaf}") for leaf in leaves)), None)
        if today is None:
            return dict(modules)
        groups.setdefault((today, int(match["index"]), match["owner"]), {})[match["layer"]] = modules[name]
    problems = Problems()
    result = {}
    for (today, index, owner), layers_of in groups.items():
        module, _, leaf = today.rpartition(".")
        place = BareParameter(module, leaf, counts[owner], index)
        with problems.collected():
            made = _matrix(f"{module}.{index}.{leaf}", place, layers_of)
            result[made.name] = made
    problems.raise_any("the updates of a mixture's experts do not fit each other")
    containers = {owner.removesuffix("experts") for _, _, owner in groups}  # and their names today
    containers |= {today.rpartition(".")[0].removesuffix("experts") for today, _, _ in groups}
    for name, layer in modules.items():
        if name not in found:
            other = _beside(layer, containers, rename)
            result[other.name] = other
    return dict(sorted(result.items()))


def layer_of_expert(name: str) -> tuple[str, int, int | None] | None:
    """The stacked parameter that a layer of an expert is a part of today, the expert, and the half of its rows.

    >>> layer_of_expert("model.layers.0.block_sparse_moe.experts.3.w3")
    ('model.layers.0.mlp.experts.gate_up_proj', 3, 1)
    """
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    half = _HALVES.get(match["layer"])
    owner = match["owner"].replace(*_BLOCK)
    return f"{owner}.{_DOWN if half is None else _FUSED}", int(match["index"]), half


def layers_beside_stacks(experts: Iterable[Mapping[str, LoraModule]]) -> set[str]:
    """The first layer of each mixture that keeps the names of earlier models, while another expert has it stacked.

    Args:
        experts: the modules of each expert.
    """
    stacked: set[str] = set()
    layers: dict[str, str] = {}
    for modules in experts:
        for name, module in modules.items():
            if module.parameter is not None:
                stacked.add(module.parameter.module)
            elif match := _EXPERT.fullmatch(name):
                layers.setdefault(match["owner"].replace(*_BLOCK), name)
    return {name for owner, name in layers.items() if owner in stacked}


def _beside(layer: LoraModule, containers: set[str], rename: Rename) -> LoraModule:
    """A layer beside the experts of a mixture, as a bare parameter where PEFT would not load it as a layer.

    These are the router, and other layers whose names end like an expert's.
    """
    start, _, leaf = layer.name.rpartition("gate")
    is_router = start in containers and not leaf
    if layer.layer != "linear" or not (is_router or _TAKEN.fullmatch(layer.name)):
        return layer
    weight = rename(f"{layer.name}.weight") or f"{layer.name}.weight"
    owner = weight.rpartition(".")[0]
    return replace(layer, name=owner, parameter=BareParameter(owner, "weight", 1, 0))


def _matrix(name: str, place: BareParameter, layers: Mapping[str, LoraModule]) -> LoraModule:
    form = f"one of {place.count} matrices"
    if place.name != _FUSED:
        (only,) = layers.values()
        return replace(only, name=name, layer=form, parameter=place)
    halves: list[LoraModule | None] = [None, None]
    for layer, module in layers.items():
        halves[_HALVES[layer]] = module
    present = [half for half in halves if half is not None]
    first = present[0]
    if len({(half.d_in, half.d_out) for half in present}) > 1:
        raise PimergeError(
            f"'{present[0].name}' and '{present[1].name}' have updates of different shapes, but form one matrix today",
            "save the adapter again",
        )
    rank = sum(half.rank for half in present)
    alike = len({half.scaling for half in present}) == 1
    return FusedModule(
        name,
        first.A,
        first.B,
        next((half.bias for half in present if half.bias), None),
        rank,
        first.alpha,
        first.scaling if alike else 1.0,
        form,
        (rank, first.d_in),
        (2 * first.d_out, rank),
        parameter=place,
        halves=(halves[0], halves[1]),
    )


def _rename_of(base: Callable[[], Base]) -> Rename:
    """How parameters of earlier models are named today."""
    with suppress(PimergeError):  # a base that is not known or not here
        folder = base().folder
        if folder is not None:
            return _by_transformers(folder)
    return lambda name: name.replace(*_BLOCK)


@cache
def _by_transformers(folder: Path) -> Rename:
    from pimerge.checkpoints.checkpoint import open_checkpoint  # imports torch and transformers
    from pimerge.checkpoints.key_mapping import names_of

    names = names_of(open_checkpoint(folder))

    def rename(name: str) -> str | None:
        today = names.rename(name)
        return today if today in names.known else None

    return rename
