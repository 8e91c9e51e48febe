"""Write merged updates as a file of another format than PEFT's, under the keys that its tools read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pimerge.adapters.computed_module import ComputedModule
from pimerge.adapters.expert import Expert
from pimerge.adapters.format import FORMATS, PEFT, Format, ForWriting, Place
from pimerge.adapters.formats._keys import A_B
from pimerge.adapters.lora_module import LoraModule
from pimerge.adapters.merged_module import MergedModule, Summary
from pimerge.checkpoints.safetensors_file import open_tensors, writing_tensors
from pimerge.core.errors import PimergeError
from pimerge.core.files import read_json

PROVENANCE = "pimerge"
"""The entry of the metadata that records how a file was made."""


def result_format(experts: Sequence[Expert]) -> Format:
    """The format of a merge of compatible experts: the one that they share, or one of those that name modules alike."""
    formats = {expert.format for expert in experts}
    stacks = {expert.name: place.stack for expert in experts for place in expert.places.values() if place.stack}
    if PEFT in formats and stacks:
        name, stack = next(iter(stacks.items()))
        raise PimergeError(
            f"'{name}' has updates of a mixture's experts in '{stack}', which PEFT names otherwise",
            f"merge only files of its format, {next(e.format for e in experts if e.name == name)}",
        )
    return FORMATS.load(PEFT if PEFT in formats else experts[0].format)


@dataclass(frozen=True)
class FileLayout:
    """Where the modules of a merge are in its file.

    Attributes:
        format: the format of the file.
        places: name of each module → its place, from the first expert that has it.
        experts: the sources, for the metadata.
        dtype: dtype of the tensors.
    """

    format: Format
    places: Mapping[str, Place]
    experts: Sequence[Expert]
    dtype: torch.dtype


def file_layout(format_: Format, experts: Sequence[Expert], names: Sequence[str], dtype: torch.dtype) -> FileLayout:
    """The layout of a file with the modules of these names."""
    places = {}
    for name in names:
        known = [expert.places[name] for expert in experts if name in expert.places]
        bias = next((place.bias for place in known if place.bias), "")
        places[name] = replace(known[0], bias=bias)
    stacks = {place.stack for place in places.values()} - {""}
    left_out = sorted(
        place.stem
        for expert in experts
        for name, place in expert.places.items()
        if name not in places and place.stack in stacks
    )
    if left_out:
        raise PimergeError(
            f"'{left_out[0]}' is left out, but its file stacks it with the other experts of its mixture",
            "merge all experts of a mixture, or none of them",
        )
    ending = format_.ending
    eras = {frozenset(place.ending.name for place in expert.places.values()) for expert in experts}
    if ending and format_.one_era and len(eras) > 1:
        places = {name: replace(place, stem=name, ending=ending) for name, place in places.items()}
    return FileLayout(format_, places, experts, dtype)


def write_file(path: Path, layout: FileLayout, modules: Iterable[MergedModule], provenance: Any) -> list[Summary]:
    """Write a file of all modules, and return the rank and the errors of each.

    An adapter is small, so its tensors are in memory until all ranks are known.

    Args:
        provenance: how the result was made, as a JSON document.
    """
    found = _of_one_alpha(layout, _of_one_rank(layout, list(modules)))
    writing = _for_writing(layout, found)
    tensors: dict[str, Tensor] = {}
    for module in found:
        tensors |= _tensors(layout, layout.places[module.module.name], module)
    tensors = _stacked(layout, tensors)
    metadata = {**layout.format.metadata(writing), PROVENANCE: json.dumps(provenance, ensure_ascii=False)}
    with writing_tensors(path, tensors, metadata) as writer:
        writer.add_all(tensors)
    return [module.summary for module in found]


def documents_beside(
    layout: FileLayout, modules: Mapping[str, LoraModule], summaries: Sequence[Summary]
) -> dict[str, Any]:
    """Name → content of the JSON files that a format has beside its tensors."""
    ranks = {summary.name: summary.rank for summary in summaries}
    return layout.format.documents(_given(layout, modules, ranks, {name: float(rank) for name, rank in ranks.items()}))


def check_file(path: Path, layout: FileLayout, names: Sequence[str], config: Mapping[str, Any] | None) -> None:
    """Read a file as its tools do, before it is put in place: every module must be found where it was written.

    Args:
        config: the config beside it, for a format that has one.
    """
    try:
        content = layout.format.read(open_tensors(path), config)
    except PimergeError as error:
        raise AssertionError(f"the written file cannot be read: {error}") from error
    places = {name: place.stem for name, place in content.places.items()}
    expected = {name: layout.places[name].stem for name in names}
    assert places == expected, f"the written file does not hold the modules in their places: {layout.format.name}"


def _of_one_rank(layout: FileLayout, modules: list[MergedModule]) -> list[MergedModule]:
    """Pad factors with zeros to one rank in each group, for a format whose readers assume one."""
    if not layout.format.one_rank:
        return modules
    most: dict[str, int] = {}
    for module in modules:
        group = layout.format.group(module.module.name)
        most[group] = max(most.get(group, 0), len(module.factors.A))
    return [_padded(module, most[layout.format.group(module.module.name)]) for module in modules]


def _stacked(layout: FileLayout, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack the factors of a mixture's experts, where the file has them so; all have one rank."""
    stacks: dict[str, list[str]] = {}
    for place in layout.places.values():
        if place.stack:
            stacks.setdefault(place.stack, []).append(place.stem)
    own = A_B.slots
    for stack, stems in stacks.items():
        assert layout.format.ending is not None
        stems.sort(key=lambda stem: int(stem.rpartition(".")[2]))
        for slot in "AB":
            parts = [tensors.pop(stem + own[slot]) for stem in stems]
            tensors[stack + layout.format.ending.slots[slot]] = torch.stack(parts)
    return tensors


def _of_one_alpha(layout: FileLayout, modules: list[MergedModule]) -> list[MergedModule]:
    """Write one alpha for all modules of a part, since diffusers reads the most common one for those of an attention.

    Factors are padded with zeros to powers of two, so that the change of their scaling is one as well, and is exact.
    """
    found = []
    groups: dict[str, list[MergedModule]] = {}
    for module in modules:
        groups.setdefault(layout.format.group(module.module.name), []).append(module)
    most = {}
    for name, group in groups.items():
        factored = [m.factors for m in group if not _is_special(layout.places[m.module.name])]
        alphas = {factors.scaling * len(factors.A) for factors in factored}
        if len(alphas) > 1 and all(math.frexp(factors.scaling)[0] == 0.5 for factors in factored):
            most[name] = _power(max(len(factors.A) for factors in factored))
    for module in modules:
        alpha = most.get(layout.format.group(module.module.name))
        if not layout.format.writes_alpha or alpha is None or _is_special(layout.places[module.module.name]):
            found.append(module)
            continue
        padded = _padded(module, _power(len(module.factors.A)))
        scaling = alpha / len(padded.factors.A)
        B = padded.factors.B * (padded.factors.scaling / scaling)
        found.append(replace(padded, factors=replace(padded.factors, B=B, scaling=scaling)))
    return found


def _power(rank: int) -> int:
    """The least power of two that is not below a rank.

    >>> [_power(rank) for rank in (1, 4, 5)]
    [1, 4, 8]
    """
    return 1 << (rank - 1).bit_length()


def _is_special(place: Place) -> bool:
    """Whether a module is written otherwise than as one pair of factors."""
    return bool(place.whole or place.product or place.rows)


def _padded(module: MergedModule, rank: int) -> MergedModule:
    factors = module.factors
    return replace(module, factors=replace(factors, A=_enlarged(factors.A, rank, 0), B=_enlarged(factors.B, rank, 1)))


def _enlarged(tensor: Tensor, size: int, dim: int) -> Tensor:
    """A matrix with zeros appended along a dimension."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _tensors(layout: FileLayout, place: Place, module: MergedModule) -> dict[str, Tensor]:
    """The tensors of one module under the keys of its place."""
    factors, own = module.factors, module.module
    wide = torch.promote_types(layout.dtype, torch.float32)
    states_alpha = layout.format.writes_alpha or place.has_alpha
    found: dict[str, Tensor] = {}
    if place.product:
        found |= _as_product(layout, place, module)
    elif place.rows:
        found |= _as_parts(layout, place, module)
    elif place.whole:
        assert isinstance(own, ComputedModule)
        whole = factors.scaling * (factors.B.to(wide) @ factors.A.to(wide))
        found[f"{place.stem}.{place.whole}"] = whole.reshape(own.shapes[place.whole]).to(layout.dtype)
    else:
        A, B, scaling = factors.A, factors.B, 1.0 if states_alpha else factors.scaling
        A = A.reshape(len(A), *own.shape_A[1:])
        B = (B if scaling == 1 else (B.to(wide) * scaling).to(layout.dtype)).reshape(len(B), -1, *own.shape_B[2:])
        ends = place.ending.slots
        found[place.stem + ends["A"]] = (A.T if place.ending.transposed else A).contiguous()
        found[place.stem + ends["B"]] = (B.T if place.ending.transposed else B).contiguous()
        if states_alpha:
            found[f"{place.stem}.alpha"] = torch.tensor(factors.scaling * len(factors.A), dtype=torch.float32)
    if factors.bias is not None and place.bias:
        is_scaled = place.bias in place.ending.slots and states_alpha
        bias = factors.bias if is_scaled else (factors.bias.to(wide) * factors.scaling).to(layout.dtype)
        key = place.ending.slots.get(place.bias, f".{place.bias}")
        found[place.stem + key] = bias.contiguous()
    return found


def _as_parts(layout: FileLayout, place: Place, module: MergedModule) -> dict[str, Tensor]:
    """The update split by rows, with one rank in all parts, as sd-scripts reads it (``split_qkv``)."""
    factors = module.factors
    ends = place.ending.slots
    basis, rest = torch.linalg.qr(factors.A.double().T)
    A, B_of_all = basis.T, factors.B.double() @ rest.T  # so that the singular values below are those of ΔW
    rounding = 8 * torch.finfo(layout.dtype).eps
    pairs = []
    for B in torch.split(B_of_all, list(place.rows)):
        left, sizes, right = torch.linalg.svd(B, full_matrices=False)
        rank = max(1, int((sizes > rounding * sizes[:1]).sum()))
        pairs.append((right[:rank] @ A, left[:, :rank] * sizes[:rank]))
    rank = max(len(A) for A, _ in pairs)
    found = {f"{place.stem}.alpha": torch.tensor(factors.scaling * rank, dtype=torch.float32)}
    for part, (A, B) in enumerate(pairs):
        for slot, tensor in (("A", _enlarged(A, rank, 0)), ("B", _enlarged(B, rank, 1))):
            key = place.stem + ends[slot].removesuffix("weight") + f"{part}.weight"
            found[key] = tensor.to(layout.dtype).contiguous()
    return found


def _as_product(layout: FileLayout, place: Place, module: MergedModule) -> dict[str, Tensor]:
    """The update as LoHa or LoKr, exactly: B A ∘ 1, or 1 ⊗ B A.

    The sum of two LoHas is not a LoHa of their rank, but any matrix is a LoHa whose second product is all ones. LyCORIS
    reads LoKr with a whole second matrix if its rank is at least half its larger side without a kernel
    (``LokrModule.__init__``).
    """
    factors, own, stem = module.factors, module.module, place.stem
    A, B, rank = factors.A, factors.B, len(factors.A)
    alpha = torch.tensor(factors.scaling * rank, dtype=torch.float32)
    if place.product == "hada":
        ones_a, ones_b = B.new_zeros(B.shape), A.new_zeros(A.shape)
        ones_a[:, 0], ones_b[0] = 1, 1
        named = {"w1_a": B.contiguous(), "w1_b": A.contiguous(), "w2_a": ones_a, "w2_b": ones_b}
        return {f"{stem}.hada_{slot}": tensor for slot, tensor in named.items()} | {f"{stem}.alpha": alpha}
    one = A.new_ones(1, 1)
    if 2 * rank < max(len(B), own.shape_A[1]):
        named = {"w1": one, "w2_a": B.contiguous(), "w2_b": A.contiguous()}
        return {f"{stem}.lokr_{slot}": tensor for slot, tensor in named.items()} | {f"{stem}.alpha": alpha}
    wide = torch.promote_types(layout.dtype, torch.float32)
    whole = (factors.scaling * (B.to(wide) @ A.to(wide))).reshape(len(B), *own.shape_A[1:])
    return {
        f"{stem}.lokr_w1": one,
        f"{stem}.lokr_w2": whole.to(layout.dtype).contiguous(),
        f"{stem}.alpha": torch.tensor(1.0),
    }


def _for_writing(layout: FileLayout, modules: Sequence[MergedModule]) -> ForWriting:
    factored = [module for module in modules if not layout.places[module.module.name].whole]
    ranks = {module.module.name: len(module.factors.A) for module in factored}
    alphas = {module.module.name: module.factors.scaling * len(module.factors.A) for module in factored}
    return _given(layout, {module.module.name: module.module for module in modules}, ranks, alphas)


def _given(
    layout: FileLayout, modules: Mapping[str, LoraModule], ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> ForWriting:
    configs = [read_json(expert.config_file) if expert.config_file else {} for expert in layout.experts]
    metadata = [expert.file.metadata for expert in layout.experts]
    return ForWriting(ranks, alphas, modules, layout.places, metadata, configs)
