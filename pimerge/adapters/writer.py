"""Write merged or tuned updates as an expert's folder that PEFT loads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from pimerge.adapters.bare_parameter import ExpertOrder, Packing, bare_names, is_order_unknown, target_ranks, with_order
from pimerge.adapters.expert import Expert
from pimerge.adapters.expert_files import CONFIG, TASK, WEIGHTS
from pimerge.adapters.hadamard import HadamardPacking, hadamard_fields
from pimerge.adapters.head import Head
from pimerge.adapters.keys import PREFIX
from pimerge.adapters.lora_fields import rank_fields, ranks_to_write
from pimerge.adapters.lora_module import LoraModule, refuse_biased_embeddings
from pimerge.adapters.merged_module import MergedModule, Summary
from pimerge.adapters.model_card import CARD_FILE
from pimerge.adapters.model_class import task_fields
from pimerge.adapters.output_check import check_adapter
from pimerge.adapters.padding import pad_factors
from pimerge.adapters.peft_check import check_with_peft
from pimerge.checkpoints.base import Base, folder_from
from pimerge.checkpoints.base_shapes import base_modules
from pimerge.checkpoints.safetensors_file import writing_tensors
from pimerge.checkpoints.tokenizer_files import tokenizer_files
from pimerge.core.files import json_text, new_folder, relative_to, sha256_bytes, sha256_file, write_into
from pimerge.core.manifest import MANIFEST_FILE, Manifest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COEFFICIENTS_FILE = "coefficients.json"


class Coefficients(BaseModel):
    """The content of ``coefficients.json``.

    Attributes:
        experts: folders of the experts, relative to the file's folder, in the order of the weights.
        sha256: SHA-256 of each expert's tensors.
        scales: strength of each expert's update, before its weight; 1 by default.
        experts_trained: whether the experts' factors were trained as well, so that the weights alone do not
            reproduce the result.
        weights: module → one weight per expert.
    """

    model_config = ConfigDict(extra="forbid")

    method: str
    granularity: str
    experts: list[str]
    sha256: list[str]
    scales: list[FiniteFloat] = Field(default_factory=list)
    experts_trained: bool
    weights: dict[str, list[float]]

    @model_validator(mode="after")
    def _one_scale_each(self) -> Self:
        self.scales = self.scales or [1.0] * len(self.experts)
        if len(self.scales) != len(self.experts):
            raise ValueError(f"{len(self.scales)} scales for {len(self.experts)} experts")
        return self


@dataclass(frozen=True)
class Documents:
    """The files that are written beside the tensors.

    Attributes:
        manifest: the manifest; :func:`write_expert` fills in its ``outputs``.
        coefficients: the weights; None if the result is not a weighted sum.
        card: content of the README.md; None to write none.
        tokenizer: the folder whose tokenizer is copied; None to copy none.
    """

    manifest: Manifest
    coefficients: Coefficients | None = None
    card: str | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Layout:
    """The tensors that the expert's file will hold, known before the first one is computed.

    Attributes:
        modules: the modules.
        dtype: dtype of the factors.
        has_bias: whether every module has a bias update (``lora_bias``).
        open_with_peft: whether PEFT opens the result before it is put in place, even if PEFT has to be imported.
        as_hadamard: whether the result is a LoHa; see :mod:`pimerge.adapters.hadamard`.
    """

    modules: Sequence[LoraModule]
    dtype: torch.dtype
    has_bias: bool
    open_with_peft: bool = False
    as_hadamard: bool = False


def write_expert(
    path: Path,
    layout: Layout,
    modules: Iterable[MergedModule],
    head: Head,
    *,
    base: Base,
    like: Mapping[str, Any],
    documents: Callable[[Sequence[Summary]], Documents],
    force: bool,
) -> Documents:
    """Write an expert's folder completely or not at all, one module at a time.

    The config states the scalings of the modules without rsLoRA: r = alpha for scaling 1. Ranks and alphas that differ
    are in ``rank_pattern`` and ``alpha_pattern``.

    Args:
        modules: merged modules; each is requested after the previous one has been written.
        like: config from which ``task_type``, ``auto_mapping``, ``fan_in_fan_out`` and ``layer_replication`` are kept.
        documents: gives the files beside the tensors, once all modules are written.
    """
    refuse_biased_embeddings(layout.modules, layout.has_bias)

    def write(file: Path) -> list[Summary]:
        summaries = _write_tensors(file, layout, modules, head)
        ranks = _ranks(layout, summaries)
        if ranks_to_write(ranks) != ranks and not layout.as_hadamard:
            pad_factors(file, layout.modules, ranks_to_write(ranks))
        return summaries

    return _write_folder(
        path,
        write,
        lambda summaries: _config(path, layout, summaries, head, base, like),
        head,
        base,
        documents,
        force,
        layout.open_with_peft,
    )


_SETS = frozenset({"target_modules", "exclude_modules", "feedforward_modules"})


def write_tensor_sets(
    path: Path,
    tensors: Callable[[], Mapping[str, Tensor]],
    head: Head,
    *,
    base: Base,
    like: Expert,
    documents: Callable[[], Documents],
    force: bool,
) -> Documents:
    """Write an expert without ΔW completely or not at all.

    Args:
        tensors: gives key → tensor; called once the folder can be written.
        like: an expert of the same form; its config is copied except for the base and the head.
        documents: gives the files beside the tensors.
    """
    prefix = like.strategy.prefix

    def write(file: Path) -> list[Summary]:
        everything = {**tensors(), **{prefix + name: tensor for name, tensor in head.tensors.items()}}
        with writing_tensors(file, sorted(everything)) as writer:
            writer.add_all(everything)
        return []

    # sorted, since PEFT writes sets in a different order in every process
    sets = {name: sorted(value) for name, value in like.config.items() if name in _SETS and isinstance(value, list)}
    return _write_folder(
        path,
        write,
        lambda _: {
            **like.config,
            **sets,
            **task_fields(like.config, head.tensors, before_text=like.strategy.before_text),
            **_own_fields(path, head, base, saves=bool(head.modules) or "modules_to_save" in like.config),
        },
        head,
        base,
        lambda _: documents(),
        force,
    )


def _write_folder(
    path: Path,
    write_tensors: Callable[[Path], list[Summary]],
    config: Callable[[Sequence[Summary]], dict[str, Any]],
    head: Head,
    base: Base,
    documents: Callable[[Sequence[Summary]], Documents],
    force: bool,
    open_with_peft: bool = False,
) -> Documents:
    """Write the tensors, and then the documents that describe them."""
    with new_folder(path, force=force) as partial:
        summaries = write_tensors(partial / WEIGHTS)
        written = documents(summaries)
        contents: dict[str, str | bytes] = {CONFIG: json_text(config(summaries))}
        if head.task is not None:
            contents[TASK] = json_text(head.task.document_for(path))
        if written.coefficients is not None:
            contents[COEFFICIENTS_FILE] = json_text(written.coefficients.model_dump())
        if written.card is not None:
            contents[CARD_FILE] = written.card
        if written.tokenizer is not None:
            contents |= {file.name: file.read_bytes() for file in tokenizer_files(written.tokenizer)}
        outputs = {
            name: sha256_bytes(content.encode() if isinstance(content, str) else content)
            for name, content in contents.items()
        }
        outputs[WEIGHTS] = sha256_file(partial / WEIGHTS)
        manifest = written.manifest.model_copy(update={"outputs": dict(sorted(outputs.items()))})
        contents[MANIFEST_FILE] = json_text(manifest.model_dump())
        write_into(partial, contents)
        check_adapter(partial, base)
        if open_with_peft or "peft.peft_model" in sys.modules:
            check_with_peft(partial, base)
    return replace(written, manifest=manifest)


def _write_tensors(file: Path, layout: Layout, modules: Iterable[MergedModule], head: Head) -> list[Summary]:
    heads = {PREFIX + name: tensor for name, tensor in head.tensors.items()}
    packing, summaries = (HadamardPacking if layout.as_hadamard else Packing)(layout.modules), []
    with writing_tensors(file, [*packing.keys, *heads]) as writer:
        narrow = {key: tensor for key, tensor in heads.items() if tensor.itemsize < layout.dtype.itemsize}
        writer.add_all({key: tensor for key, tensor in heads.items() if key not in narrow})
        for module in modules:
            for key, tensor in packing.add(module).items():
                writer.add(key, tensor)
            summaries.append(module.summary)
        writer.add_all(narrow)
    return summaries


def _config(
    path: Path, layout: Layout, summaries: Sequence[Summary], head: Head, base: Base, like: Mapping[str, Any]
) -> dict[str, Any]:
    ranks = _ranks(layout, summaries)
    fields = {
        "peft_type": "LORA",
        **task_fields(like, head.tensors, adapted=[module.name for module in layout.modules]),
        **_own_fields(path, head, base),
        **rank_fields(
            ranks if layout.as_hadamard else ranks_to_write(ranks),
            base_modules(base),
            bare_names(layout.modules),
            {summary.name: summary.scaling for summary in summaries},
        ),
        **({"layer_replication": like["layer_replication"]} if like.get("layer_replication") else {}),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "lora_bias": layout.has_bias,
        "bias": "all" if head.biases else "none",
        "fan_in_fan_out": bool(like.get("fan_in_fan_out")),
        "init_lora_weights": True,
    }
    if layout.as_hadamard:
        return hadamard_fields(fields)
    is_unclear = "target_parameters" in fields and is_order_unknown(fields)
    return with_order(fields, ExpertOrder.RANK) if is_unclear else fields


def _ranks(layout: Layout, summaries: Sequence[Summary]) -> dict[str, int]:
    return target_ranks(layout.modules, {summary.name: summary.rank for summary in summaries})


def _own_fields(path: Path, head: Head, base: Base, *, saves: bool = True) -> dict[str, Any]:
    """The fields of the config that name the base and the head; not all kinds have ``modules_to_save``."""
    name, revision = base_reference(base, path)
    return {
        "base_model_name_or_path": name or None,
        "revision": revision,
        "inference_mode": True,
        **({"modules_to_save": sorted(head.modules) or None} if saves else {}),
        **({"trainable_token_indices": head.token_indices} if head.token_indices else {}),
    }


def base_reference(base: Base, path: Path) -> tuple[str, str | None]:
    """Name and revision of a base for an expert at ``path``: its own name if found from there, or a relative path."""
    if base.folder is None or base.folder.parent.name == "snapshots":
        return base.name, base.revision
    found = folder_from(path, base.name)
    same = found is not None and found.resolve() == base.folder.resolve()
    return (base.name if same else relative_to(base.folder, path)), base.revision
