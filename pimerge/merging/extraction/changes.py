"""What changed between a base and a fine-tuned checkpoint, and what of it a LoRA can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pimerge.adapters.head import Head
from pimerge.checkpoints.checkpoint import Checkpoint, require_weights
from pimerge.checkpoints.dtypes import FLOATS
from pimerge.checkpoints.key_mapping import Names, align, names_of, skeleton
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.progress import Track
from pimerge.merging.extraction.layers import ChangedModule, NotAdapted, adapted

_BLOCK = 2**21  # numbers of a tensor that are in memory at once
_TASKS = {  # ending of a model's class → PEFT's task type
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Task types with which PEFT saves and expects the head as a whole."""


@dataclass(frozen=True)
class LeftOut:
    """A changed tensor that the LoRA does not hold.

    Attributes:
        size: ‖W − W0‖ / ‖W0‖; None for another shape or W0 = 0.
        energy: ‖W − W0‖²; 0 for another shape.
    """

    name: str
    why: str
    size: float | None = None
    energy: float = 0.0


@dataclass
class Changes:
    """The changes of a fine-tuned checkpoint; see :func:`find_changes`.

    Attributes:
        modules: the weights that become a LoRA, by module.
        sizes, energies: ‖W − W0‖ / ‖W0‖ and ‖W − W0‖² of each of them.
        cosines: cosine similarity of W and W0, which is about 0 if W was not trained from W0.
        left_out: what changed and is left out.
        head: parameter name → key of each tensor that is saved whole.
        saved: the modules that these belong to (``modules_to_save``).
        unchanged: number of tensors that equal the base's.
        tied: modules that share one changed weight, each with its own factors.
        fields: PEFT's ``task_type`` and ``auto_mapping``.
    """

    modules: dict[str, ChangedModule] = field(default_factory=dict)
    sizes: dict[str, float | None] = field(default_factory=dict)
    energies: dict[str, float] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    head: dict[str, str] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    unchanged: int = 0
    tied: list[list[str]] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)

    def read_head(self, finetuned: Checkpoint) -> Head:
        """Read the tensors that are saved whole."""
        return Head({name: finetuned.read(key) for name, key in self.head.items()}, self.saved, None)


def find_changes(base: Checkpoint, finetuned: Checkpoint, track: Track) -> Changes:
    """Compare two checkpoints tensor by tensor, and sort what differs.

    Weights of Linear, Conv1D, convolution and embedding layers become a LoRA. Modules that the base lacks, and the head
    of a classifier, are saved whole. Everything else that changed is left out by name: biases, norms, other parameters,
    and tensors of another shape.
    """
    _check(base, finetuned)
    own, names = names_of(base), names_of(finetuned)
    model = skeleton(finetuned, finetuned.config)
    layers = None if model is None else dict(model.named_modules())
    found = Changes(fields=_fields(finetuned.config, model))
    places = _places(base, finetuned, own, names)
    whole = _whole_modules(base, finetuned, names, places, found.fields["task_type"])
    problems = Problems()
    with track("compare", len(finetuned.home), "tensors") as advance:
        for key, name in names.parameter.items():
            advance(1)
            module = next((each for each in whole if name.startswith(f"{each}.")), None)
            if module is not None:
                found.head[name] = key
                found.saved = sorted({*found.saved, module})
            elif key not in places:
                found.left_out.append(LeftOut(name, "the base has no such tensor"))
            else:
                with problems.collected():
                    _compare(found, base, places[key], finetuned, key, names, layers)
    problems.raise_any(f"no LoRA can be extracted from '{finetuned.name}'")
    return found


def _check(base: Checkpoint, finetuned: Checkpoint) -> None:
    problems = Problems()
    for checkpoint in (base, finetuned):
        with problems.collected():
            require_weights(checkpoint)
    found, expected = (checkpoint.config.get("model_type") for checkpoint in (finetuned, base))
    if found and expected and found != expected:
        problems.add(
            f"'{finetuned.name}' is of type {found}, and the base '{base.name}' of type {expected}",
            "pass the base that it was fine-tuned from",
        )
    problems.raise_any("the checkpoints cannot be compared")


def _fields(config: Mapping[str, Any], model: nn.Module | None) -> dict[str, Any]:
    """PEFT's ``task_type`` and ``auto_mapping`` for the class of the fine-tuned model."""
    if model is None:
        return {"task_type": None, "auto_mapping": None}
    name = type(model).__name__
    task = next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
    if task is None and name.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder"):
        task = "SEQ_2_SEQ_LM"
    mapping = {"base_model_class": name, "parent_library": type(model).__module__}
    return {"task_type": task, "auto_mapping": None if task else mapping}


def _places(base: Checkpoint, finetuned: Checkpoint, own: Names, names: Names) -> dict[str, str]:
    """Key in the fine-tuned checkpoint → the base's stored key; tied weights of the base share one."""
    places = align(own, names)
    shared = own.shared or {}
    for key, name in names.parameter.items():
        if key not in places and name in shared:
            places[key] = shared[name]
    return places


def _whole_modules(
    base: Checkpoint, finetuned: Checkpoint, names: Names, places: Mapping[str, str], task_type: str | None
) -> list[str]:
    """The modules to save whole: those that the base lacks, and heads of another shape or of a classifier."""
    whole = []
    for key, name in names.parameter.items():
        is_head = names.in_head(name)
        lacks = name in names.known and key not in places
        differs = key in places and base.entry(places[key]).shape != finetuned.entry(key).shape
        if lacks or (is_head and (differs or task_type in _WITH_HEAD)):
            whole.append(name.partition(".")[0] if is_head else name.rpartition(".")[0])
    return list(dict.fromkeys(whole))


def _compare(
    found: Changes,
    base: Checkpoint,
    before: str,
    finetuned: Checkpoint,
    after: str,
    names: Names,
    layers: Mapping[str, nn.Module] | None,
) -> None:
    """Compare one tensor, and sort it if it changed."""
    name = names.parameter[after]
    old, new = base.entry(before), finetuned.entry(after)
    if old.shape != new.shape:
        found.left_out.append(LeftOut(name, f"its shape is {new.shape}, in the base {old.shape}"))
        return
    distance = _distance(base, before, finetuned, after)
    if distance is None:
        found.unchanged += 1
        return
    square, energy, cosine = distance
    size = math.sqrt(square / energy) if energy else None
    # tied weights share a stored tensor, but each of their layers needs its own factors
    owners = [name, *(other for other, key in (names.shared or {}).items() if key == after)]
    for owner in owners:
        module = owner.removesuffix(".weight")
        try:
            if names.known and owner not in names.known:
                raise NotAdapted("transformers makes the weight of its layer from several tensors, or does not load it")
            found.modules[module] = adapted(owner, new.shape, layers, before, after)
            found.sizes[module], found.energies[module], found.cosines[module] = size, square, cosine
        except NotAdapted as reason:
            if owner == name:
                found.left_out.append(LeftOut(name, str(reason), size, square))
    if len(owners) > 1:
        found.tied.append([owner.removesuffix(".weight") for owner in owners])


def _distance(base: Checkpoint, before: str, finetuned: Checkpoint, after: str) -> tuple[float, float, float] | None:
    """‖W − W0‖², ‖W0‖² and the cosine similarity of W and W0; None if they are equal in the dtype of W.

    Integers that differ count as infinitely far apart.
    """
    entry = finetuned.entry(after)
    is_float = entry.dtype in FLOATS and base.entry(before).dtype in FLOATS
    count, differs, square, energy, own = math.prod(entry.shape), False, 0.0, 0.0, 0.0
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        old = base.home[before].read_part(before, start, stop)
        new = finetuned.home[after].read_part(after, start, stop)
        differs |= not torch.equal(new, old.to(new.dtype))
        if is_float:
            old, new = old.double(), new.double()
            square += float((new - old).square().sum())
            energy += float(old.square().sum())
            own += float(new.square().sum())
    if not differs:
        return None
    if not is_float:
        return 0.0, 0.0, 1.0
    if not math.isfinite(square):
        raise PimergeError(
            f"'{after}' of '{finetuned.name}' or of the base contains NaN or Inf", "its training diverged"
        )
    return square, energy, (own + energy - square) / (2 * math.sqrt(own * energy) or 1.0)
