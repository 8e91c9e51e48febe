"""Plan a merge of full checkpoints: which tensors are merged, which stay, and which heads are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pimerge.checkpoints.checkpoint import Checkpoint, require_weights
from pimerge.checkpoints.dtypes import FLOATS
from pimerge.checkpoints.key_mapping import Names, align, names_of
from pimerge.checkpoints.safetensors_file import TensorFile, open_tensors
from pimerge.checkpoints.vocabularies import one_vocabulary
from pimerge.core.errors import PimergeError, Problems
from pimerge.merging.method import METHODS, OpenedMethod
from pimerge.merging.request import HeadPolicy


@dataclass(frozen=True)
class CheckpointPlan:
    """The tensors that a merge of checkpoints reads and writes; see :func:`plan_checkpoints`.

    Attributes:
        merged: key in the base → key in each expert, for every merged tensor.
        heads: key in the output → index of the expert → key in that expert, for every tensor of a head.
        dropped: keys of the heads that are left out.
        fishers: file with the Fisher of each expert, if the method needs it.
        config: content of the written ``config.json``; None copies the base's.
        vocabulary: how vocabularies of several sizes are merged; empty if all have one size.
        tokenizer: the checkpoint whose tokenizer is written; None for the base.
    """

    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    merged: dict[str, list[str]]
    heads: dict[str, dict[int, str]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    fishers: tuple[TensorFile, ...] = ()
    config: dict[str, Any] | None = None
    vocabulary: str = ""
    tokenizer: Checkpoint | None = None

    @property
    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Key in the output → shape, for every tensor of a head."""
        first = {key: next(iter(parts.items())) for key, parts in self.heads.items()}
        return {key: self.experts[number].entry(source).shape for key, (number, source) in first.items()}


@dataclass
class _Sorted:
    """The tensors of one expert: key in the base → own key, and for its head, key in the output → own key."""

    same: dict[str, str] = field(default_factory=dict)
    head: dict[str, str] = field(default_factory=dict)


def plan_checkpoints(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    method: OpenedMethod,
    *,
    fishers: Sequence[Path] | None = None,
    head: HeadPolicy = HeadPolicy.NONE,
    target: int | None = None,
    selected: Callable[[str], bool] | None = None,
) -> CheckpointPlan:
    """Check that checkpoints can be merged, and plan the merge without computing or writing anything.

    Args:
        fishers: one safetensors file per expert, with the Fisher of each tensor, for methods that need it.
        head: how to handle head tensors, which only experts have or whose labels differ: ``none`` leaves them out
            (the base keeps its own), ``target`` takes the target's, ``average`` takes the mean.
        target: index of the target's expert.
        selected: tells by key of the base which tensors to merge; None merges all.
    """
    _check_method(method)
    problems = Problems()
    for checkpoint in (base, *experts):
        with problems.collected():
            require_weights(checkpoint)
    _check_models(base, experts, problems)
    problems.raise_any("the checkpoints cannot be merged")
    chosen = selected or (lambda key: True)
    grown = one_vocabulary([base, *experts], chosen, problems)
    problems.raise_any("the vocabularies of the checkpoints do not fit each other")
    base, *experts = grown.checkpoints
    own = names_of(base)
    relabelled = len({str(found.config.get("id2label")) for found in (base, *experts)}) > 1
    found = [_sort(base, own, expert, relabelled, problems, chosen) for expert in experts]
    _heads_for_all(found)
    merged = {
        key: [part.same[key] for part in found]
        for key in base.home
        if chosen(key) and _is_merged(base, key, experts, found, own, problems)
    }
    heads = _choose_heads(head, target, experts, [part.head for part in found], problems)
    files = _fishers(method, fishers, experts, merged, problems)
    problems.raise_any("the checkpoints cannot be merged")
    dropped = sorted({key for part in found for key in part.head} - heads.keys())
    config = _config(base, experts[target or 0]) if heads else None
    return CheckpointPlan(
        base, tuple(experts), merged, heads, tuple(dropped), files, config, grown.sentence, grown.largest
    )


def _check_method(method: OpenedMethod) -> None:
    if method.space.takes_any_tensor:
        return
    possible = [other.name for other in METHODS if other.space.takes_any_tensor]
    raise PimergeError(
        f"'{method.name}' needs low-rank updates or their inputs, which full checkpoints do not have",
        f"these methods merge full checkpoints: {', '.join(possible)}",
    )


def _check_models(base: Checkpoint, experts: Sequence[Checkpoint], problems: Problems) -> None:
    if not experts:
        problems.add("there are no experts to merge")
    for expert in experts:
        found, expected = (checkpoint.config.get("model_type") for checkpoint in (expert, base))
        if found and expected and found != expected:
            problems.add(
                f"'{expert.name}' is of type {found}, and the base '{base.name}' of type {expected}",
                "merge checkpoints that were fine-tuned from the base",
            )


def _sort(
    base: Checkpoint,
    own: Names,
    expert: Checkpoint,
    relabelled: bool,
    problems: Problems,
    selected: Callable[[str], bool],
) -> _Sorted:
    """Sort the tensors of an expert into those of the base and those of its head."""
    names = names_of(expert)
    keys = align(own, names)
    found = _Sorted()
    for key, name in names.parameter.items():
        is_head, home = names.in_head(name), keys.get(key)
        if home is not None:
            same = expert.entry(key).shape == base.entry(home).shape
            if not same and not selected(home):
                continue
            if is_head and (relabelled or not same):
                found.head[home] = key
            elif same:
                found.same[home] = key
            else:
                problems.add(
                    f"'{key}' of '{expert.name}' has the shape {expert.entry(key).shape}, not {base.entry(home).shape}",
                    "a resized vocabulary or a replaced layer cannot be merged: leave the expert out",
                )
        elif names.known and name not in names.known:
            continue  # transformers ignores it as well
        elif name in (own.shared or {}):
            if not any(name in group for group in names.groups):
                problems.add(f"'{expert.name}' has its own '{key}', which the base shares with its embedding")
        elif is_head or not names.known:
            found.head[key] = key
        else:
            problems.add(f"'{expert.name}' has '{key}', which the base lacks", "it was made from another base")
    return found


def _heads_for_all(found: Sequence[_Sorted]) -> None:
    """Treat a tensor that belongs to the head of one expert as a head tensor in all of them."""
    for key in {key for part in found for key in part.head}:
        for part in found:
            if key in part.same:
                part.head[key] = part.same.pop(key)


def _is_merged(
    base: Checkpoint,
    key: str,
    experts: Sequence[Checkpoint],
    found: Sequence[_Sorted],
    own: Names,
    problems: Problems,
) -> bool:
    """Whether every expert has a counterpart of a tensor of the base; it is a problem if only some have one."""
    having = [number for number, part in enumerate(found) if key in part.same]
    if base.entry(key).dtype not in FLOATS:
        value = base.read(key)
        for number in having:
            if not torch.equal(value, experts[number].read(found[number].same[key])):
                problems.add(f"'{key}' of '{experts[number].name}' has different integers than in the base")
        return False
    unused = bool(own.known) and own.parameter[key] not in own.known
    if having and len(having) < len(found) and not unused and not _unchanged(base, key, experts, found, having):
        lacking = [expert.name for number, expert in enumerate(experts) if number not in having]
        problems.add(
            f"'{key}' of the base is missing in {', '.join(lacking)}, but not in the other experts",
            "leave these experts out, or exclude the tensor",
        )
    return len(having) == len(found)


def _unchanged(
    base: Checkpoint, key: str, experts: Sequence[Checkpoint], found: Sequence[_Sorted], having: Sequence[int]
) -> bool:
    """Whether the experts that have a tensor have the base's values, which the result then keeps.

    Not so if another expert lacks it because it is tied there: then it has the values of another tensor.
    """
    if any(_ties(experts[number]) != _ties(base) for number in range(len(experts)) if number not in having):
        return False
    value = base.read(key)
    own = (experts[number].read(found[number].same[key]) for number in having)
    return all(torch.equal(each, value.to(each.dtype)) for each in own)


def _ties(checkpoint: Checkpoint) -> tuple[object, object]:
    """What the config says of tied embeddings; a default is not stated."""
    inner = checkpoint.config.get("text_config") or {}
    return checkpoint.config.get("tie_word_embeddings"), inner.get("tie_word_embeddings")


def _choose_heads(
    policy: HeadPolicy,
    target: int | None,
    experts: Sequence[Checkpoint],
    heads: Sequence[Mapping[str, str]],
    problems: Problems,
) -> dict[str, dict[int, str]]:
    """Choose the head tensors to write: key in the output → index of the expert → key in that expert."""
    if policy is HeadPolicy.TARGET and target is None and any(heads):
        problems.add("it is not known which expert is the target's", "pass --target, --head average or --head none")
    if policy is HeadPolicy.TARGET and target is not None:
        return {key: {target: name} for key, name in heads[target].items()}
    if policy is HeadPolicy.AVERAGE:
        _check_average(experts, heads, problems)
        every = heads[0].keys() if heads else set()
        return {key: {n: head[key] for n, head in enumerate(heads) if key in head} for key in every}
    return {}


def _check_average(experts: Sequence[Checkpoint], heads: Sequence[Mapping[str, str]], problems: Problems) -> None:
    hint = "pass --head target or --head none"
    first = experts[0]
    for expert, head in zip(experts, heads, strict=True):
        labels, expected = (checkpoint.config.get("id2label") for checkpoint in (expert, first))
        if any(heads) and labels != expected:
            problems.add(f"the heads have different labels: '{expert.name}' {labels}, '{first.name}' {expected}", hint)
        shapes = {key: expert.entry(name).shape for key, name in head.items()}
        if shapes != {key: first.entry(name).shape for key, name in heads[0].items()}:
            problems.add(f"the heads of '{expert.name}' and '{first.name}' have different tensors", hint)


def _fishers(
    method: OpenedMethod,
    paths: Sequence[Path] | None,
    experts: Sequence[Checkpoint],
    merged: Mapping[str, list[str]],
    problems: Problems,
) -> tuple[TensorFile, ...]:
    """Open the Fisher of each expert, and check that it has a tensor of the same shape for each merged one."""
    if "fishers" not in method.needs:
        return ()
    if len(paths or ()) != len(experts):
        problems.add(
            f"'{method.name}' needs one Fisher file per expert; got {len(paths or ())} for {len(experts)} experts",
            "pass --fisher once per expert, with a safetensors file that has the keys of the checkpoint",
        )
        return ()
    files = []
    for number, (path, expert) in enumerate(zip(paths or (), experts, strict=True)):
        with problems.collected():
            file = open_tensors(path)
            files.append(file)
            wanted = [keys[number] for keys in merged.values()]
            missing = [key for key in wanted if key not in file.entries]
            wrong = [key for key in wanted if key not in missing and file.entries[key].shape != expert.entry(key).shape]
            for what, keys in (("lacks", missing), ("has another shape for", wrong)):
                if keys:
                    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
                    problems.add(f"'{path}' {what} {', '.join(keys[:5])}{more}", "pass the Fisher of this checkpoint")
    return tuple(files)


def _config(base: Checkpoint, source: Checkpoint) -> dict[str, Any] | None:
    """Return the config of the expert whose head is written, with the dtype of the base."""
    if base.is_file or source.is_file:
        return None
    stated: dict[str, Any] = {name: base.config[name] for name in ("dtype", "torch_dtype") if name in base.config}
    return {**source.config, **stated}
