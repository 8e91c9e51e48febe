"""Merge the parameters of the base that adapters hold: embeddings, rows of embeddings (tokens) and biases.

    φ̂ = φ0 + Σ_n w_n (φ_n − φ0)

with φ0 the base's values, which are also those of an expert that does not hold the parameter. The base is read only if
an expert lacks the parameter or the weights do not sum to 1. Rows of tokens that not all experts have are the weighted
mean over those that have them: a row that one expert has alone is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from pimerge.adapters.additive_tensors import F64, BaseTensor, weighted
from pimerge.adapters.expert import Expert
from pimerge.adapters.head import Head, head_modules, rows_of
from pimerge.adapters.keys import TOKEN_ROWS, is_of_model, is_saved, parameter_of
from pimerge.adapters.token_modules import require_same_tokens, token_count
from pimerge.checkpoints.safetensors_file import is_finite
from pimerge.core.errors import PimergeError
from pimerge.merging.choice import ChosenExperts
from pimerge.merging.method import OpenedMethod, Space
from pimerge.merging.request import HeadPolicy
from pimerge.merging.tensor_merge import base_reader
from pimerge.merging.update_merge import widest

_ONE = 1e-9


@dataclass(frozen=True)
class HeldParameter:
    """An expert's values of a parameter of the base.

    Attributes:
        key: key of its tensor.
        tokens: the rows that the tensor holds, if it does not hold all.
        is_saved: whether it is in ``modules_to_save``.
    """

    key: str
    tokens: tuple[int, ...] | None
    is_saved: bool


def with_base_parameters(
    head: Head, policy: HeadPolicy, chosen: ChosenExperts, method: OpenedMethod, adapted: Collection[str]
) -> Head:
    """Add the merged embeddings and biases to the head of a result.

    With the policy ``none``, whole embeddings are the base's; trained rows of tokens, which are not a head, are merged.
    If the target is known and holds embeddings or rows, these are the result's.

    Args:
        adapted: the modules that the result updates, whose own parameters have ``base_layer`` in their names.
    """
    experts, target = chosen.experts, chosen.target
    is_targets = policy is HeadPolicy.TARGET and target is not None and len(experts) > 1
    is_none = policy is HeadPolicy.NONE
    keeps = is_none or (is_targets and any(True for _ in held_embeddings(target)))  # type: ignore[arg-type]
    found_in = [dict(held_embeddings(expert)) for expert in experts]
    taken = [{name: own for name, own in each.items() if not keeps or (is_none and own.tokens)} for each in found_in]
    held = [dict(_biases(expert)) | each for expert, each in zip(experts, taken, strict=True)]
    left = sorted({name for each, own in zip(found_in, taken, strict=True) for name in each if name not in own})
    remarks = (f"trained embeddings ({', '.join(left)}) are left out: --head none",) if is_none and left else ()
    head = replace(head, remarks=(*head.remarks, *remarks))
    parameters = sorted({name for each in held for name in each})
    if not parameters:
        return head
    vocabulary = _same_tokens(experts, held)
    merge = _ParameterMerge(experts, method, chosen.weights, base_reader(experts[0].base))
    tensors = {name: tensor for name, tensor in head.tensors.items() if keeps or not is_of_model(name, head.modules)}
    biases, indices, modules = set(), dict[str, tuple[int, ...]](), set(head.modules)
    for parameter in parameters:
        own = [each.get(parameter) for each in held]
        module, _, end = parameter.rpartition(".")
        _refuse_two_ways(parameter, own, experts)
        found = [each for each in own if each is not None]
        if all(each.tokens is not None for each in found):
            name, tokens = f"{module}{TOKEN_ROWS}", tuple(dict.fromkeys(t for each in found for t in each.tokens or ()))
            indices[module], merged = tokens, merge.rows(parameter, own, tokens)
        else:
            is_inside = module in adapted and not any(each.is_saved for each in found)
            name, merged = f"{module}.base_layer.{end}" if is_inside else parameter, merge.full(parameter, own)
        tensors[name] = merged
        biases |= {name} if any(parameter in expert.biases for expert in experts) else set()
        modules |= {m for e in experts for m in head_modules(e) if is_saved(name, [m]) and name not in biases}
    return replace(
        head,
        tensors=tensors,
        modules=sorted(modules),
        token_indices=_token_indices(indices, experts) if indices else head.token_indices if keeps else None,
        biases=frozenset(biases),
        remarks=(*remarks, vocabulary, *_remarks(biases, held)),
    )


def held_embeddings(expert: Expert) -> Iterator[tuple[str, HeldParameter]]:
    """The embeddings that an expert holds: parameter of the base → its values."""
    saved = expert.config.get("modules_to_save") or []
    rows = rows_of(expert.head, expert.config.get("trainable_token_indices"))
    for name, key in expert.head.items():
        if is_of_model(name, saved):
            parameter = f"{name.removesuffix(TOKEN_ROWS)}.weight" if name in rows else parameter_of(name)
            yield parameter, HeldParameter(key, rows.get(name), is_saved(name, saved))


def _biases(expert: Expert) -> Iterator[tuple[str, HeldParameter]]:
    return ((name, HeldParameter(key, None, False)) for name, key in expert.biases.items())


@dataclass(frozen=True)
class _ParameterMerge:
    """The experts, and how their values of one parameter are merged."""

    experts: Sequence[Expert]
    method: OpenedMethod
    weights: Mapping[str, Sequence[float]]
    base: BaseTensor

    def full(self, parameter: str, held: Sequence[HeldParameter | None]) -> Tensor:
        """Merge a whole parameter, of which some experts may have more rows than others."""
        stored = [None if each is None else e.tensor(each.key) for e, each in zip(self.experts, held, strict=True)]
        present = [tensor for tensor in stored if tensor is not None]
        zero = cache(lambda: self.base(parameter).to(F64))
        is_everywhere = len(present) == len(held) and all(each is None or each.tokens is None for each in held)
        is_same = is_everywhere and all(torch.equal(tensor, present[0]) for tensor in present)
        if is_same and self.experts[0].base.folder is None:
            return present[0]
        parts = [_whole(each, tensor, zero, parameter) for each, tensor in zip(held, stored, strict=True)]
        weights = self._weights(parameter)
        lowest = min(len(part) for part in parts)
        coefficients = self._coefficients(weights, lambda: [part[:lowest] - zero()[:lowest] for part in parts])
        known = zero() if abs(1 - sum(coefficients)) >= _ONE else None
        found, start = [], 0
        for stop in sorted({*map(len, parts), *([] if known is None else [len(known)])}):
            holders = [(part[start:stop], w) for part, w in zip(parts, coefficients, strict=True) if len(part) >= stop]
            if len(holders) == len(parts) and (known is None or len(known) >= stop):
                own = None if known is None else known[start:stop]
                found.append(weighted([part for part, _ in holders], coefficients, lambda own=own: own))  # type: ignore[misc]
            elif holders:
                found.append(_mean(holders))
            start = stop
        return self._rounded(parameter, torch.cat(found), held)

    def rows(self, parameter: str, held: Sequence[HeldParameter | None], tokens: Sequence[int]) -> Tensor:
        """Merge rows of an embedding; an expert that did not train one of them has the base's."""
        stored = [
            {} if each is None else dict(zip(each.tokens or (), e.tensor(each.key).to(F64), strict=True))
            for e, each in zip(self.experts, held, strict=True)
        ]
        zero = cache(lambda: self.base(parameter).to(F64))
        weights = self._weights(parameter)

        def deltas() -> list[Tensor]:
            return [torch.stack([own.get(t, zero()[t]) - zero()[t] for t in tokens]) for own in stored]

        coefficients = self._coefficients(weights, deltas)
        found = []
        for token in tokens:
            holders = [(own[token], w) for own, w in zip(stored, coefficients, strict=True) if token in own]
            if len(holders) == len(stored) and abs(1 - sum(coefficients)) < _ONE:
                found.append(weighted([row for row, _ in holders], coefficients, lambda: zero()[0]))
            elif token < len(zero()):
                found.append(
                    zero()[token] + sum(((row - zero()[token]) * w for row, w in holders), torch.zeros((), dtype=F64))
                )
            else:
                found.append(_mean(holders))
        return self._rounded(parameter, torch.stack(found), held)

    def _weights(self, parameter: str) -> list[float]:
        """The weights in the parameter's module; where no expert adapts it, those that all modules have."""
        module = parameter.rpartition(".")[0]
        if module in self.weights:
            return list(self.weights[module])
        different = {tuple(row) for row in self.weights.values()}
        if len(different) > 1:
            raise PimergeError(
                f"the experts hold trained values of '{parameter}', and the weights differ by module, with none "
                "for this one",
                "use the same weights for all modules; for embeddings, --head none keeps the base's and --head target "
                "--target EXPERT those of one expert",
            )
        return list(different.pop())

    def _coefficients(self, weights: Sequence[float], deltas: Callable[[], Sequence[Tensor]]) -> list[float]:
        """The coefficients of a linear method; any other method sums these parameters with the weights."""

        def inner() -> Tensor:
            flat = torch.stack([delta.reshape(-1) for delta in deltas()])
            return flat @ flat.T

        if self.method.space is not Space.LINEAR:
            return list(weights)
        return self.method.coefficients(torch.tensor(weights, dtype=F64), inner).tolist()

    def _rounded(self, parameter: str, merged: Tensor, held: Sequence[HeldParameter | None]) -> Tensor:
        """The result in the experts' dtype."""
        dtypes = [[e.file.entries[each.key].dtype] for e, each in zip(self.experts, held, strict=True) if each]
        found = merged.to(widest(dtypes))
        if not is_finite(found):
            raise PimergeError(
                f"the merged '{parameter}' holds NaN or Inf",
                "check the experts with 'pimerge inspect', or use smaller weights",
            )
        return found


def _whole(held: HeldParameter | None, stored: Tensor | None, zero: Callable[[], Tensor], parameter: str) -> Tensor:
    """All rows of an expert's parameter, with the base's where it has none."""
    if held is None or stored is None:
        return zero()
    if held.tokens is None:
        return stored.to(F64)
    if max(held.tokens) >= len(zero()):
        raise PimergeError(
            f"one expert holds all rows of '{parameter}' and another one rows of tokens that the base does not have",
            "leave one of them out",
        )
    found = zero().clone()
    found[list(held.tokens)] = stored.to(F64)
    return found


def _mean(holders: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The weighted mean of values; the first if the weights sum to 0."""
    total = sum(weight for _, weight in holders)
    if abs(total) < _ONE:
        return holders[0][0]
    return sum((value * (weight / total) for value, weight in holders), torch.zeros((), dtype=F64))


def _refuse_two_ways(parameter: str, held: Sequence[HeldParameter | None], experts: Sequence[Expert]) -> None:
    """Refuse a parameter that PEFT replaces in one layer for one expert, and in all tied layers for another."""
    ways = {each.is_saved: expert.name for expert, each in zip(experts, held, strict=True) if each is not None}
    if len(ways) > 1:
        raise PimergeError(
            f"'{parameter}' is in modules_to_save of '{ways[True]}', and '{ways[False]}' holds it beside its adapter",
            "leave one of them out, or take the embeddings of one: --head target --target EXPERT",
        )


def _same_tokens(experts: Sequence[Expert], held: Sequence[Mapping[str, HeldParameter]]) -> str:
    """Check that the rows that experts hold are of the same tokens; how they are merged if vocabularies differ."""
    embeddings = [
        {name: own for name, own in parameters.items() if name not in expert.biases}
        for expert, parameters in zip(experts, held, strict=True)
    ]
    holders: list[tuple[Expert, Collection[int]]] = []
    for expert, parameters in zip(experts, embeddings, strict=True):
        whole = [expert.file.entries[own.key].shape[0] for own in parameters.values() if own.tokens is None]
        tokens = {token for own in parameters.values() for token in own.tokens or ()}
        if whole or tokens:
            holders.append((expert, range(max(whole)) if whole else tokens))
        elif any(embeddings) and (count := token_count(expert)) is not None:
            holders.append((expert, range(count)))
    return require_same_tokens(holders)


def _token_indices(
    indices: Mapping[str, tuple[int, ...]], experts: Sequence[Expert]
) -> list[int] | dict[str, list[int]]:
    """The field ``trainable_token_indices`` for rows of these modules, in the form that the experts have."""
    stated = [value for expert in experts if (value := expert.config.get("trainable_token_indices"))]
    if len(indices) == 1 and all(isinstance(value, list) for value in stated):
        return list(*indices.values())
    layers = {layer for value in stated if isinstance(value, dict) for layer in value}
    return {
        next((layer for layer in sorted(layers) if f".{module}".endswith(f".{layer}")), module): list(tokens)
        for module, tokens in indices.items()
    }


def _remarks(biases: Collection[str], held: Sequence[Mapping[str, HeldParameter]]) -> Iterator[str]:
    """Sentences for the plan."""
    if biases:
        yield f"{len(biases)} trained biases of the base, such as '{min(biases)}', are summed with the weights"
    embeddings = sorted({name for each in held for name, own in each.items()} - {parameter_of(name) for name in biases})
    if embeddings:
        yield f"trained embeddings ({', '.join(embeddings)}) are summed with the weights, as updates of the base's"
