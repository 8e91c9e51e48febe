"""Merged or tuned updates → an expert's folder that PEFT loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from pimerge import strategies
from pimerge.base import Base, folder_from
from pimerge.errors import PimergeError, Problems
from pimerge.expert import CONFIG, TASK, WEIGHTS, Expert
from pimerge.files import json_text, relative_to, sha256_bytes, write_folder
from pimerge.kinds.lora import PREFIX
from pimerge.lowrank import MergedModule
from pimerge.manifest import MANIFEST_FILE, Manifest
from pimerge.task import Task, open_task

if TYPE_CHECKING:
    from torch import Tensor

COEFFICIENTS_FILE = "coefficients.json"
HEAD_POLICIES = ("target", "average", "none")


class Coefficients(BaseModel):
    """The content of ``coefficients.json``.

    Attributes:
        experts: their folders, relative to the file's, in the order of the weights.
        sha256: of each expert's tensors.
        experts_trained: whether the experts' factors were trained too, so that the weights alone do not
            give the result again.
        weights: module → one weight per expert.
    """

    model_config = ConfigDict(extra="forbid")

    method: str
    granularity: str
    experts: list[str]
    sha256: list[str]
    experts_trained: bool
    weights: dict[str, list[float]]


@dataclass(frozen=True)
class Head:
    """A task head to write beside the factors.

    Attributes:
        tensors: parameter name in the base model → tensor.
        modules: ``modules_to_save`` that they belong to.
        task: what the head answers; None if that is not known.
    """

    tensors: Mapping[str, Tensor]
    modules: Sequence[str]
    task: Task | None


NO_HEAD = Head({}, (), None)


def choose_head(policy: str, experts: Sequence[Expert], target: Expert | None) -> Head:
    """The head of a merged expert.

    Args:
        policy: ``target`` (the target's own), ``average`` (the mean, if all answer the same labels) or ``none``.
        target: the target's expert, if it is known.

    Raises:
        PimergeError: if the policy cannot be followed.
    """
    import torch

    if policy not in HEAD_POLICIES:
        raise PimergeError(f"--head is '{policy}'", f"expected {', '.join(HEAD_POLICIES)}")
    if policy == "none" or not any(expert.head for expert in experts):
        return NO_HEAD
    if policy == "target":
        if target is None:
            raise PimergeError(
                "the experts have heads, and it is not known which is the target's",
                "pass --target NAME_OR_FOLDER, --head average (if all answer the same labels) or --head none",
            )
        return Head(target.head_tensors(), _head_modules(target), task_of(target))
    tasks = {expert.name: task_of(expert) for expert in experts}
    problems = Problems()
    first = experts[0]
    labels = tasks[first.name]
    for expert in experts:
        task = tasks[expert.name]
        if task is None or labels is None or task.labels != labels.labels:
            problems.add(
                f"the head of '{expert.name}' answers {task.labels if task else 'labels that no task.json names'}, "
                f"that of '{first.name}' {labels.labels if labels else 'labels that no task.json names'}",
                "pass --head target or --head none",
            )
        elif _shapes(expert) != _shapes(first):
            problems.add(f"the head of '{expert.name}' has other tensors than that of '{first.name}'")
    problems.raise_any("the heads cannot be averaged")
    mean = {
        name: torch.stack([expert.tensor(expert.head[name]).double() for expert in experts])
        .mean(0)
        .to(first.tensor(key).dtype)
        for name, key in first.head.items()
    }
    return Head(mean, _head_modules(first), labels)


def task_of(expert: Expert) -> Task | None:
    """The task of an expert, if its folder says so."""
    return open_task(expert.path) if (expert.path / TASK).is_file() else None


def write_expert(
    path: Path,
    modules: Sequence[MergedModule],
    head: Head,
    *,
    base: Base,
    like: Mapping[str, Any],
    coefficients: Coefficients | None,
    manifest: Manifest,
    force: bool,
) -> Manifest:
    """Write an expert's folder whole or not at all.

    The config has r = alpha (scaling 1), rsLoRA off, and ``rank_pattern`` where ranks differ.

    Args:
        like: config fields to keep: ``task_type``, ``auto_mapping``, ``fan_in_fan_out``.
        manifest: its ``outputs`` are filled in here.

    Raises:
        PimergeError: if the folder is there and ``force`` is off, or the disk refuses.
    """
    from safetensors.torch import save

    stored = strategies.load("kinds", "lora").stored
    tensors: dict[str, Tensor] = {}
    for merged in modules:
        tensors |= stored(merged.module, merged.factors)
    tensors |= _zero_biases(modules, tensors)
    tensors |= {PREFIX + name: tensor.contiguous() for name, tensor in head.tensors.items()}
    contents: dict[str, bytes | str] = {
        CONFIG: json_text(_config(path, modules, head, base, like)),
        WEIGHTS: save({key: tensors[key].detach().cpu() for key in sorted(tensors)}, {"format": "pt"}),
    }
    if head.task is not None:
        contents[TASK] = json_text(head.task.document_for(path))
    if coefficients is not None:
        contents[COEFFICIENTS_FILE] = json_text(coefficients.model_dump())
    outputs = {
        name: sha256_bytes(content.encode() if isinstance(content, str) else content)
        for name, content in contents.items()
    }
    manifest = manifest.model_copy(update={"outputs": outputs})
    contents[MANIFEST_FILE] = json_text(manifest.model_dump())
    write_folder(path, contents, force=force)
    return manifest


def _config(
    path: Path, modules: Sequence[MergedModule], head: Head, base: Base, like: Mapping[str, Any]
) -> dict[str, Any]:
    ranks = {merged.module.name: merged.rank for merged in modules}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    # PEFT takes the first key that a module's name ends with, so longer names go first and all are listed.
    differ = len(set(ranks.values())) > 1
    pattern = {name: ranks[name] for name in sorted(ranks, key=lambda n: (-len(n), n))} if differ else {}
    name, revision = _base_reference(base, path)
    return {
        "peft_type": "LORA",
        "task_type": like.get("task_type"),
        "auto_mapping": like.get("auto_mapping"),
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "lora_bias": any(merged.factors.bias is not None for merged in modules),
        "bias": "none",
        "fan_in_fan_out": bool(like.get("fan_in_fan_out")),
        "init_lora_weights": True,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(head.modules) or None,
    }


def _base_reference(base: Base, path: Path) -> tuple[str, str | None]:
    """How an expert at ``path`` names its base: as before if that is found from there, else by relative path."""
    if base.folder is None or base.folder.parent.name == "snapshots":
        return base.name, base.revision
    found = folder_from(path, base.name)
    same = found is not None and found.resolve() == base.folder.resolve()
    return (base.name if same else relative_to(base.folder, path)), base.revision


def _zero_biases(modules: Sequence[MergedModule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's ``lora_bias`` holds for all modules, so one without a bias update gets zeros."""
    keys = {merged.module.name: f"{PREFIX}{merged.module.name}.lora_B.bias" for merged in modules}
    biased = [name for name, key in keys.items() if key in tensors]
    if not biased:
        return {}
    embeddings = [merged.module.name for merged in modules if merged.module.layer == "embedding"]
    if embeddings:
        raise PimergeError(
            f"'{biased[0]}' has a bias (lora_bias), '{embeddings[0]}' is an embedding: PEFT loads no expert with both",
            "leave out the experts with lora_bias or those that adapt embeddings",
        )
    return {
        keys[merged.module.name]: merged.factors.B.new_zeros(len(merged.factors.B))
        for merged in modules
        if keys[merged.module.name] not in tensors
    }


def _head_modules(expert: Expert) -> list[str]:
    saved: list[str] = expert.config.get("modules_to_save") or []
    return [name for name in saved if any(f".{name}." in f".{parameter}" for parameter in expert.head)]


def _shapes(expert: Expert) -> dict[str, tuple[int, ...]]:
    return {name: tuple(expert.tensor(key).shape) for name, key in expert.head.items()}
