"""Pair what a merge holds with the updates that it should be the sum of, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from pimerge.adapters.expert import Expert
from pimerge.adapters.into_stacks import placed_factors
from pimerge.adapters.lora_module import Factors, LoraModule, times_added
from pimerge.adapters.merge_into import MergeIntoPlan, plan_merge_into
from pimerge.adapters.token_modules import form_of
from pimerge.checkpoints.checkpoint import Checkpoint
from pimerge.checkpoints.dtypes import FLOATS
from pimerge.checkpoints.key_mapping import align, names_of
from pimerge.core.errors import PimergeError, Problems
from pimerge.merging.verification.base_values import Read, values_in_base
from pimerge.merging.verification.compared_tensor import ComparedTensor, Dense, Part, StoredTensor, low_rank
from pimerge.merging.verification.verdict import CheckedModule, Scaling, Verdict

Source = Expert | Checkpoint


@dataclass
class Pairing:
    """The tensors to compare.

    Attributes:
        comparisons: module, or key of a tensor → a function that reads its comparison.
        scalings: the scaling of each expert, for each comparison.
        untouched: key of the base → the base's tensor and the merge's, for tensors that no expert changes.
        modules: verdicts on modules that need no comparison, since they are missing or have another shape.
        beside: such verdicts on tensors that no expert changes.
        resized: key of the merge → the base's tensor, of another number of rows.
        extra: key of the merge → why it is not compared with the base: empty if the base has no such tensor.
        remarks: what is not part of the claim.
    """

    comparisons: dict[str, Callable[[], ComparedTensor]] = field(default_factory=dict)
    scalings: dict[str, list[Scaling]] = field(default_factory=dict)
    untouched: dict[str, tuple[StoredTensor, StoredTensor]] = field(default_factory=dict)
    modules: list[CheckedModule] = field(default_factory=list)
    beside: list[CheckedModule] = field(default_factory=list)
    resized: dict[str, StoredTensor] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(
        self,
        name: str,
        shape: tuple[int, int],
        base: Dense | Callable[[], Dense] | None,
        parts: Sequence[Callable[[], Part | None]],
    ) -> None:
        """Add a comparison; the first part is the merge's."""

        def read() -> ComparedTensor:
            found, *updates = (part() for part in parts)
            return ComparedTensor(name, found, updates, base() if callable(base) else base, shape)

        self.comparisons[name] = read


def pair_tensors(merged: Source, experts: Sequence[Source], base: Checkpoint, read: Read) -> Pairing:
    """Pair the tensors of full checkpoints, or of adapters and full checkpoints, relative to a base."""
    pairing = Pairing()
    sources = [merged, *experts]
    plan = _plan(base, [source for source in sources if isinstance(source, Expert) and not source.tensor_sets])
    held = [values_in_base(base, source, read) if isinstance(source, Expert) else {} for source in sources]
    held_keys = {key: key for each in held for key in each}
    if apart := held_keys.keys() - base.home.keys():
        shared = names_of(base).shared or {}
        plan = replace(plan, copies={**plan.copies, **{key: shared[key] for key in apart}})
    biases = {key: module for key, module in plan.biases.items() if key not in held_keys}
    modules = {**held_keys, **plan.weights, **biases, **{key: key for key in plan.stacks}}
    wanted = list(dict.fromkeys([*base.home, *modules]))
    keys = [_own_keys(base, source, wanted) if isinstance(source, Checkpoint) else {} for source in sources]
    if isinstance(merged, Checkpoint):
        used = set(keys[0].values())
        pairing.extra = {key: "" for key in sorted(merged.home) if key not in used}
        wanted = _present(pairing, merged, keys[0], base, plan, modules, wanted)
        _remark_shared(pairing, merged, keys[0], modules)
    for key in wanted:
        stored, entry = StoredTensor(base.home[plan.source(key)], plan.source(key)), base.entry(plan.source(key))
        is_touched = key in modules or any(key in own for own in keys[1:])
        if not is_touched or entry.dtype not in FLOATS:
            if isinstance(merged, Checkpoint):
                pairing.untouched[key] = stored, StoredTensor(merged.home[keys[0][key]], keys[0][key])
            continue
        if key in plan.stacks:
            _add_stack(pairing, sources, keys, key, plan, read)
            continue
        name = f"{modules[key]}.bias" if key in biases else modules.get(key, key)
        rows = entry.shape[0] if entry.shape else 1
        shape = (rows, math.prod(entry.shape) // max(1, rows))
        parts = [
            values[key] if key in values else partial(_part, source, own, key, plan, read)
            for source, own, values in zip(sources, keys, held, strict=True)
        ]
        pairing.add(name, shape, stored, parts)
        pairing.scalings[name] = [scaling_of(expert, modules.get(key, "")) for expert in experts]
    return pairing


def layouts_of(experts: Sequence[Expert], *, any_vocabulary: bool = False) -> dict[str, LoraModule]:
    """The layout of each module of several adapters, which must agree on its shape.

    Args:
        any_vocabulary: whether they may have updates of several numbers of tokens.
    """
    found: dict[str, LoraModule] = {}
    problems = Problems()
    for expert in experts:
        if expert.tensor_sets:
            problems.add(
                f"'{expert.name}' is of kind {expert.kind}, which has no ΔW, and another one has",
                "an adapter without ΔW is compared with adapters of its kind, or with a full checkpoint",
            )
        for name, module in expert.modules.items():
            known = found.setdefault(name, module)
            is_same = any_vocabulary and form_of(known) == form_of(module)
            if (known.d_out, known.d_in) != (module.d_out, module.d_in) and not is_same:
                problems.add(
                    f"module '{name}': ΔW is {module.d_out} × {module.d_in} in '{expert.name}', but "
                    f"{known.d_out} × {known.d_in} in another adapter",
                    "they belong to different bases",
                )
    problems.raise_any("these adapters cannot be compared")
    return dict(sorted(found.items()))


def _plan(base: Checkpoint, adapters: Sequence[Expert]) -> MergeIntoPlan:
    if not adapters:
        return MergeIntoPlan(base, {}, {}, {}, {}, frozenset(), False, None)
    fan_in_first = any(bool(expert.config.get("fan_in_fan_out")) for expert in adapters)
    layouts = layouts_of(adapters)
    try:
        return plan_merge_into(base, layouts, fan_in_fan_out=fan_in_first)
    except PimergeError as error:
        raise PimergeError(f"the adapters do not fit the base '{base.path}'", problems=error.problems) from error


def _own_keys(base: Checkpoint, other: Checkpoint, wanted: Sequence[str]) -> dict[str, str]:
    """Key in the base → key in another checkpoint, regardless of prefixes; tied weights share a tensor."""
    found = {key: key for key in wanted if key in other.home}
    if len(found) == len(wanted):
        return found
    own, names = names_of(base), names_of(other)
    aligned = {home: key for key, home in align(own, names).items()}
    shared = names.shared or {}
    for key in wanted:
        name = own.parameter.get(key, key)
        place = aligned.get(key) or shared.get(name) or shared.get(f"{names.prefix}.{name}")
        if key not in found and place is not None:
            found[key] = place
    return found


def _present(
    pairing: Pairing,
    merged: Checkpoint,
    keys: Mapping[str, str],
    base: Checkpoint,
    plan: MergeIntoPlan,
    modules: Mapping[str, str],
    wanted: Sequence[str],
) -> list[str]:
    """The keys whose tensors can be compared; the others are missing or have another shape."""
    present, absent = [], []
    for key in wanted:
        if key not in keys:
            absent.append(key)
            continue
        before, after = base.entry(plan.source(key)), merged.entry(keys[key])
        reason = ""
        if after.shape != before.shape:
            reason = f"its shape is {after.shape}, in the base {before.shape}"
        elif after.dtype not in FLOATS and before.dtype in FLOATS:
            reason = f"it is stored as {after.dtype}"
        if not reason:
            present.append(key)
        elif key in modules:
            pairing.modules.append(CheckedModule(modules[key], Verdict.OTHER, reason=reason))
        else:
            pairing.extra[keys[key]] = reason
            if after.shape[1:] == before.shape[1:]:
                pairing.resized[keys[key]] = StoredTensor(base.home[plan.source(key)], plan.source(key))
    if absent:
        own, names = names_of(base), names_of(merged)
        for key in absent:
            name = own.parameter.get(key, key)
            if key in modules or not names.known or {name, f"{names.prefix}.{name}"} & names.known:
                verdicts = pairing.modules if key in modules else pairing.beside
                verdicts.append(CheckedModule(modules.get(key, key), Verdict.MISSING))
            else:
                pairing.remarks.append(f"'{key}' of the base has no place in the architecture of '{merged.name}'")
    return present


def _remark_shared(pairing: Pairing, merged: Checkpoint, keys: Mapping[str, str], modules: Mapping[str, str]) -> None:
    """Remark that several updates are for one tensor of the merge, as if tied weights are merged without untying."""
    owners: dict[str, list[str]] = {}
    for key, module in modules.items():
        if key in keys:
            owners.setdefault(keys[key], []).append(module)
    for key, names in owners.items():
        if len(names) > 1:
            pairing.remarks.append(
                f"{' and '.join(names)} share '{key}' in '{merged.name}', which cannot hold an update for each: "
                "tied weights were merged without untying them"
            )


def _add_stack(
    pairing: Pairing,
    sources: Sequence[Source],
    keys: Sequence[Mapping[str, str]],
    key: str,
    plan: MergeIntoPlan,
    read: Read,
) -> None:
    """Add one comparison for each matrix of a stacked tensor, such as the weights of a mixture's experts."""
    file, entry = plan.checkpoint.home[key], plan.checkpoint.entry(key)
    rows, columns = entry.shape[-2:]
    placed = {each.index: each for each in plan.stacks[key]}

    def part(source: Source, own: Mapping[str, str], index: int) -> Part | None:
        if isinstance(source, Checkpoint):
            return StoredTensor(source.home[own[key]], own[key], index * rows) if key in own else None
        place = placed.get(index)
        if place is None or place.module not in source.modules:
            return None
        factors = placed_factors(place, lambda module: read(source, module))
        return low_rank(factors, transposed=key in plan.transposed)

    for index in range(math.prod(entry.shape[:-2])):
        place = placed.get(index)
        name = place.module if place and place.half is None else key if place else f"{key}[{index}]"
        parts = [partial(part, source, own, index) for source, own in zip(sources, keys, strict=True)]
        pairing.add(name, (rows, columns), StoredTensor(file, key, index * rows), parts)
        pairing.scalings[name] = [scaling_of(source, place.module if place else "") for source in sources[1:]]


def _part(source: Source, own: Mapping[str, str], key: str, plan: MergeIntoPlan, read: Read) -> Part | None:
    """The update of a source for a key of the base."""
    if isinstance(source, Checkpoint):
        return StoredTensor(source.home[own[key]], own[key]) if key in own else None
    if key in plan.biases:
        return bias_update_of(source, plan.biases[key], read)
    return update_of(source, plan.weights[key], read, key in plan.transposed) if key in plan.weights else None


def update_of(expert: Expert, module: str, read: Read, transposed: bool) -> Part | None:
    """The update of an adapter in a module; None if it does not adapt the module."""
    if module not in expert.modules:
        return None
    is_recomputed = bool(expert.modules[module].conversions)
    factors = read(expert, module)
    factors = replace(factors, scaling=times_added(module) * factors.scaling)
    return low_rank(factors, transposed=transposed, is_recomputed=is_recomputed)


def bias_update_of(expert: Expert, module: str, read: Read) -> Part | None:
    """The bias update as a matrix of one column."""
    if module not in expert.modules or not expert.modules[module].bias:
        return None
    factors = read(expert, module)
    assert factors.bias is not None
    one = factors.bias.new_ones(1, 1)
    return low_rank(Factors(one, factors.bias[:, None], factors.scaling), transposed=False)


def scaling_of(source: Source, module: str) -> Scaling:
    """The scaling of an expert in a module; 1 for a full checkpoint or a kind without factors."""
    if not isinstance(source, Expert) or module not in source.modules:
        return Scaling()
    layout = source.modules[module]
    if layout.is_computed or layout.conversions:
        return Scaling()
    return Scaling(layout.scaling, layout.rank, bool(source.config.get("use_rslora")))


def require_same_shapes(base: Checkpoint, experts: Sequence[Source]) -> None:
    """Refuse full checkpoints among the experts whose tensors have other shapes than the base's."""
    problems = Problems()
    for expert in experts:
        if not isinstance(expert, Checkpoint):
            continue
        for key, own in _own_keys(base, expert, list(base.home)).items():
            if expert.entry(own).shape != base.entry(key).shape:
                problems.add(f"'{own}' of '{expert.name}' is {expert.entry(own).shape}, not {base.entry(key).shape}")
    problems.raise_any("the experts do not fit the base")
