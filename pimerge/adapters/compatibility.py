"""Check whether experts can be embedded, compared and summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pimerge.adapters.expert import Expert
from pimerge.adapters.format import FORMATS, PEFT
from pimerge.adapters.fused_experts import layers_beside_stacks
from pimerge.adapters.lora_module import FLATTENED
from pimerge.adapters.shared_modules import refuse_names
from pimerge.adapters.token_modules import form_of
from pimerge.core.errors import PimergeError, Problems
from pimerge.tasks.task import Task, open_task

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARED_INIT_COSINE = 0.1
SHARED_INIT_DEVIATIONS = 5.0
INIT_MODULES = 16


def check_expert(expert: Expert, task: Task | None = None) -> Task:
    """Check an expert as far as possible without loading its base.

    Args:
        task: a task that replaces the one in its folder.

    Returns:
        the expert's task.
    """
    from pimerge.adapters.base_fit import check_fits_on_disk  # imports torch

    if expert.format != PEFT:
        raise PimergeError(
            f"its format is that of {expert.format}, which PEFT does not load, so it can only be merged and compared",
            "use 'pimerge merge' or 'pimerge rank --target FILE', which need no base model",
        )
    problems = Problems()
    with problems.collected():
        expert.require_handled()
        refuse_only_merged([expert], "embedded")
    with problems.collected():
        task = task or open_task(expert.folder)
    with problems.collected():
        expert.base.require_reachable()
        _ = expert.base.identity
        if task is not None and not expert.unhandled:
            check_fits_on_disk(expert, task)
    with problems.collected():
        expert.require_finite()
    problems.raise_any(f"the expert '{expert.name}' cannot be embedded")
    assert task is not None
    return task


def require_alike(experts: Sequence[Expert], *, any_vocabulary: bool = False) -> None:
    """Check that experts can be summed.

    They must share a base and, in each module, the shape and layer type of ΔW, whatever their kinds; experts without ΔW
    must share their kind and the form of their tensors.

    Args:
        any_vocabulary: whether their vocabularies may have several sizes.
    """
    problems = Problems()
    first = experts[0]
    shapes: dict[str, tuple[str, Expert, tuple[object, ...]]] = {}
    for expert in experts:
        if _differ(expert, first):
            problems.add(
                f"'{expert.name}' has {expert.base.label}, '{first.name}' has {first.base.label}, which is another "
                "model",
                "leave one of them out; if both are the same model, pass it with --base",
            )
        if _naming(expert) != _naming(first):
            problems.add(
                f"'{expert.name}' has the format of {expert.format}, '{first.name}' that of {first.format}, and these "
                "name modules differently",
                "merge files of one format; the tools that wrote them convert between formats",
            )
        if (expert.config.get("layer_replication") or []) != (first.config.get("layer_replication") or []):
            problems.add(
                f"'{expert.name}' and '{first.name}' copy other layers of their base (layer_replication)",
                "leave one of them out",
            )
        with problems.collected():
            expert.require_handled()
        if expert.kind != first.kind and (expert.tensor_sets or first.tensor_sets):
            reason = _why_no_update(expert if expert.tensor_sets else first)
            problems.add(
                f"'{expert.name}' is of kind {expert.kind}, '{first.name}' of kind {first.kind}: {reason}",
                "only experts with a ΔW can be summed across kinds: combine experts of one kind",
            )
        elif expert.tensor_sets and expert.parts != first.parts and refuse_names([expert, first], problems):
            continue
        elif expert.tensor_sets and (why := differing_form(first, expert, f"'{first.name}'")):
            problems.add(f"'{expert.name}': {why}", "leave it out")
        for name, module in expert.modules.items():
            form = (module.layer, module.d_out, module.d_in, module.shape_A[2:])
            _, owner, known = shapes.setdefault(name, (name, expert, form))
            is_flat = FLATTENED in (form[0], known[0]) and known[1:3] == form[1:3]
            is_same = any_vocabulary and form_of(module) == form_of(owner.modules[name])
            if known != form and not (is_flat or is_same):
                problems.add(
                    f"module '{name}': ΔW is {module.d_out} × {module.d_in} ({module.layer}) in '{expert.name}', "
                    f"{known[1]} × {known[2]} ({known[0]}) in '{owner.name}'",
                    "they belong to different bases: leave one out",
                )
    for name in sorted(layers_beside_stacks(expert.modules for expert in experts)):
        problems.add(
            f"'{name}' is the layer of a mixture's expert in one adapter and a part of a stacked parameter in another",
            "merge adapters of one version of the model; DoRA's are converted only together",
        )
    problems.raise_any("these experts do not fit each other")


def _differ(expert: Expert, other: Expert) -> bool:
    """Whether two experts have different bases; files of other formats than PEFT's need not name one."""
    if not (expert.base.is_known and other.base.is_known) and not expert.format == other.format == PEFT:
        return False
    return expert.base.identity != other.base.identity


def require_finite(experts: Sequence[Expert]) -> None:
    """Check every tensor of several experts for NaN and Inf."""
    problems = Problems()
    for expert in experts:
        with problems.collected(f"'{expert.name}': "):
            expert.require_finite()
    problems.raise_any("NaN or Inf weights")


def _naming(expert: Expert) -> str:
    """How its format names modules."""
    return FORMATS.load(expert.format).naming


def _why_no_update(expert: Expert) -> str:
    """Why an expert has no ΔW that can be added to another's."""
    return expert.strategy.why_no_update or f"{expert.kind} does not add a ΔW to a matrix of the base"


def init_cosine(first: Expert, second: Expert) -> tuple[float, float]:
    """Cosine similarity of the tensors that identify the inits of two experts, and the least cosine of a shared init.

    The tensors are the kind's ``init_slots`` (the factors A of LoRA); a kind without any always has the same init.
    Training changes them little, so experts from one init have a high cosine. Experts from independent inits, or in
    different bases (BR, R⁻¹A), have a cosine of about ±1/√n over n numbers.
    """
    if not first.strategy.init_slots:
        return 1.0, 0.0
    common = sorted(set(first.parts) & set(second.parts))
    few = common[:: -(-len(common) // INIT_MODULES) or 1]  # as informative as all modules
    a, b = (_init_numbers(expert, few) for expert in (first, second))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    least = max(SHARED_INIT_COSINE, SHARED_INIT_DEVIATIONS / max(len(a), 1) ** 0.5)
    return (float(a @ b) / norms if norms > 0 else 0.0), least


def _init_numbers(expert: Expert, parts: Sequence[str]) -> NDArray[np.float64]:
    found = [_key_of_slot(expert, name) for name in parts]
    keys = list(dict.fromkeys(each[slot] for each in found for slot in expert.strategy.init_slots if slot in each))
    arrays = expert.file.arrays(keys)
    return np.concatenate([np.zeros(0), *(arrays[key].ravel() for key in keys)]).astype(np.float64)


def _key_of_slot(expert: Expert, part: str) -> Mapping[str, str]:
    """Slot → key of a module or tensor set."""
    if expert.tensor_sets:
        return {name: slot.key for name, slot in expert.tensor_sets[part].slots.items()}
    return expert.modules[part].key_of_slot


def differing_form(first: Expert, second: Expert, name_of_first: str = "the target") -> str:
    """Why two experts cannot be compared entry by entry; empty if they can.

    Args:
        name_of_first: how the reason refers to the first expert.
    """
    if first.kind != second.kind:
        return f"its kind is {second.kind}, but {name_of_first} is of kind {first.kind}"
    if first.parts != second.parts:
        return f"it adapts other modules than {name_of_first}"
    for field in first.strategy.meaning_fields:
        if first.config.get(field) != second.config.get(field):
            return f"its {field} is {second.config.get(field)}, but {first.config.get(field)} in {name_of_first}"
    for name, part in (first.tensor_sets | first.modules).items():
        if part.form != (second.tensor_sets | second.modules)[name].form:
            return f"its tensors of '{name}' have other shapes than in {name_of_first}"
    if first.ranks != second.ranks or any(
        first.modules[name].rank != second.modules[name].rank for name in first.modules
    ):
        return f"its rank is {_listed(second.ranks)}, but {name_of_first} has rank {_listed(first.ranks)}"
    if _has_bias(first) != _has_bias(second):
        return f"only one of it and {name_of_first} has biases in its factors (lora_bias)"
    return ""


def require_shared_form(experts: Sequence[Expert]) -> None:
    """Check that the entries of several experts' factors correspond: the same form and the same init."""
    problems = Problems()
    first = experts[0]
    for expert in experts:
        if expert.is_computed:
            problems.add(
                f"'{expert.name}' is of kind {expert.kind}: its factors are computed from what was trained",
                "use a method that works on ΔW, such as uniform or ties",
            )
    problems.raise_any("the factors of these experts cannot be compared entry by entry")
    for expert in experts[1:]:
        why = differing_form(first, expert, f"'{first.name}'")
        if not why:
            cosine, least = init_cosine(first, expert)
            if cosine < least:
                why = f"it was trained from another init than '{first.name}' (cosine similarity of A: {cosine:.2f})"
        if why:
            problems.add(f"'{expert.name}': {why}", "use a method that works on ΔW, such as uniform or ties")
    problems.raise_any("the factors of these experts cannot be compared entry by entry")


def _listed(ranks: Sequence[int]) -> str:
    return "/".join(str(rank) for rank in ranks)


def _has_bias(expert: Expert) -> bool:
    return any(module.bias is not None for module in expert.modules.values())


def refuse_only_merged(experts: Sequence[Expert], what: str) -> None:
    """Refuse experts that adapt bare parameters (``target_parameters``) or biases of the base (``bias="all"``).

    Args:
        what: what would be done with them, in the past participle.
    """
    problems = Problems()
    for expert in experts:
        found = next((module.parameter for module in expert.modules.values() if module.parameter), None)
        if found is not None:
            problems.add(
                f"'{expert.name}' adapts the parameter '{found.full_name}' (target_parameters), and only updates of "
                f"layers can be {what}",
                "merge it instead (pimerge merge), or train one on target_modules such as the attention's projections",
            )
        if expert.biases:
            problems.add(
                f"'{expert.name}' holds {len(expert.biases)} trained biases of the base, such as {min(expert.biases)} "
                f"(bias is '{expert.config.get('bias')}'), and only updates of layers can be {what}",
                "merge it instead (pimerge merge), or train one with bias='none' (lora_bias=True is accepted)",
            )
    problems.raise_any(f"some experts cannot be {what}")


def refuse_copied_layers(experts: Sequence[Expert]) -> None:
    """Refuse experts that adapt copies of the base's layers (``layer_replication``) where the base is read."""
    problems = Problems()
    for expert in experts:
        if expert.config.get("layer_replication"):
            problems.add(
                f"'{expert.name}' adapts copies of the base's layers (layer_replication), which the checkpoint of the "
                "base does not have",
                "merge such experts into an adapter: without --into, and plain LoRA only",
            )
    problems.raise_any("copied layers")


def refuse_over_inputs(output: Path, experts: Sequence[Expert]) -> None:
    """Refuse an output that would replace one of its input experts or a folder that holds one."""
    for expert in experts:
        if any(file.resolve().is_relative_to(output.resolve()) for file in (expert.path, *expert.file.files)):
            raise PimergeError(
                f"the output '{output}' is the expert '{expert.name}' or contains it", "choose another --output"
            )
