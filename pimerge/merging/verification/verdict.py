"""What a tensor of a merge is, if it is not the claimed sum: the explanations that people run into, simplest first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from pimerge.adapters.low_rank import orthonormal_basis
from pimerge.merging.verification.compared_tensor import F64, ComparedTensor, LowRank
from pimerge.merging.verification.evidence import Evidence

_CLOSE = 2e-3  # a found factor is named if it is this close
_MANY = 16  # experts whose products of factors are still tried: there are N² of them


class Verdict(StrEnum):
    """What a tensor of a merge, or the whole merge, was found to be."""

    EQUAL = "equal"
    BASE = "base"
    SCALED = "scaled"
    WEIGHTS = "weights"
    APART = "apart"
    TRANSPOSED = "transposed"
    TRUNCATED = "truncated"
    NOT_FINITE = "not finite"
    MISSING = "missing"
    CHANGED = "changed"
    OTHER = "other"


@dataclass(frozen=True)
class CheckedModule:
    """The verdict on one module, or on one tensor that belongs to none.

    Attributes:
        error: ‖found − claimed‖ / ‖claimed ΔW‖; None if there is no claimed update or the merge holds NaN or Inf.
        rounding: the largest error that rounding to the merge's dtype can cause, on the same scale.
        factor: found = factor · claimed, for the verdict ``scaled``.
        weights: the weights that explain what was found, one per expert; for ``other``, those that come closest.
        rank: the rank of what was found, for the verdict ``truncated``.
        reason: the mistake that explains the verdict, if it has a name.
    """

    name: str
    verdict: Verdict
    error: float | None = None
    rounding: float | None = None
    factor: float | None = None
    weights: list[float] = field(default_factory=list)
    rank: int | None = None
    reason: str = ""

    @property
    def explanation(self) -> str:
        """The verdict in words."""
        return self.reason or _WORDS[self.verdict]


_WORDS = {
    Verdict.EQUAL: "",
    Verdict.BASE: "equals the base: the update was not applied",
    Verdict.SCALED: "another scaling",
    Verdict.WEIGHTS: "other weights",
    Verdict.APART: "A and B were averaged apart: Σ b_n B_n · Σ a_n A_n in place of Σ w_n B_n A_n",
    Verdict.TRANSPOSED: "the update was added transposed (fan_in_fan_out)",
    Verdict.TRUNCATED: "the claimed update, truncated to a lower rank",
    Verdict.NOT_FINITE: "it holds NaN or Inf",
    Verdict.MISSING: "it is missing",
    Verdict.CHANGED: "it differs from the base, though no expert changes it",
    Verdict.OTHER: "it differs, and no usual mistake explains it",
}


@dataclass(frozen=True)
class Scaling:
    """An expert's own scaling in a module, from which the usual mistakes follow.

    Attributes:
        scaling: s, the factor of B A.
        rank: r; 0 for an update that is not stored as factors.
        uses_rslora: whether s = alpha / √r.
    """

    scaling: float = 1.0
    rank: int = 0
    uses_rslora: bool = False


def judge(
    comparison: ComparedTensor, evidence: Evidence, weights: Sequence[float], scalings: Sequence[Scaling]
) -> CheckedModule:
    """Decide what a tensor is.

    Args:
        weights: the claimed weights, one per expert.
        scalings: the experts' own scalings in this module, by which a found factor is explained.
    """
    name = comparison.name
    if not evidence.finite:
        return CheckedModule(name, Verdict.NOT_FINITE)
    claimed = evidence.claimed(weights)
    unit = claimed or 1.0
    error, rounding = evidence.difference / unit, evidence.tolerance / unit
    known = CheckedModule(name, Verdict.EQUAL, error, rounding)
    if not claimed and not evidence.fits and not any(part is not None for part in comparison.parts):
        return CheckedModule(name, Verdict.CHANGED)
    if evidence.unchanged and evidence.visible and claimed > 0:
        return _as(known, Verdict.BASE)
    if evidence.fits and not _other_weights(evidence, weights):
        lost = evidence.unchanged and claimed > 0
        return _as(known, reason=f"the update is below the precision of {_dtype(evidence)}" if lost else "")
    for found in _explanations(comparison, evidence, weights, scalings):
        return _as(known, **found)
    return _as(known, Verdict.OTHER, weights=evidence.fitted()[0].tolist())


def _as(known: CheckedModule, verdict: Verdict = Verdict.EQUAL, **more: Any) -> CheckedModule:
    return CheckedModule(known.name, verdict, known.error, known.rounding, **more)


def _dtype(evidence: Evidence) -> str:
    return str(evidence.dtype).removeprefix("torch.")


def _other_weights(evidence: Evidence, weights: Sequence[float]) -> bool:
    """Whether the found weights differ from these by more than rounding can explain.

    An entry's rounding error can hide a wrong weight where updates are small beside the weight; it averages out over
    the entries.
    """
    if evidence.noise is None or not evidence.claimed(weights):
        return False
    found, error = evidence.fitted()
    used = evidence.used
    return bool(((found - torch.tensor(list(weights), dtype=F64)).abs() > error)[used].any()) and _is_unique(evidence)


def _is_unique(evidence: Evidence) -> bool:
    """Whether the updates are linearly independent, so that only one set of weights gives the same sum."""
    norms = evidence.gram.diagonal()[1:].clamp_min(0).sqrt()
    used = evidence.used
    if not used.any():
        return False
    G = (evidence.gram[1:, 1:] / norms.outer(norms))[used][:, used]
    return bool(torch.linalg.eigvalsh(G)[0] > 1e-6)


def _explanations(
    comparison: ComparedTensor, evidence: Evidence, weights: Sequence[float], scalings: Sequence[Scaling]
) -> Iterator[dict[str, Any]]:
    """The explanations that hold, simplest first, as fields of :class:`CheckedModule`."""
    w = torch.tensor(list(weights), dtype=F64)
    if not evidence.unchanged and float(w @ evidence.gram[1:, 1:] @ w) > 0:
        along = float(w @ evidence.gram[1:, 0]) / float(w @ evidence.gram[1:, 1:] @ w)
        found = (along * w).tolist()
        is_multiple = _explains(evidence, evidence.residual(along * w), along) and not _other_weights(evidence, found)
        if min(abs(along), abs(along - 1)) > _CLOSE and is_multiple:
            reason = named(found, weights, scalings)
            yield {"verdict": Verdict.SCALED, "factor": along, "weights": found, "reason": reason}
        if evidence.residual(along * w) <= evidence.tolerance and abs(along) <= _CLOSE:
            yield {"verdict": Verdict.BASE}
    elif evidence.unchanged and evidence.visible:
        yield {"verdict": Verdict.BASE}
    v, _ = evidence.fitted()
    if not _close(v.tolist(), weights) and _explains(evidence, evidence.residual(v), float(v.abs().max())):
        reason = named(v.tolist(), weights, scalings)
        yield {"verdict": Verdict.WEIGHTS, "weights": v.tolist(), "reason": reason}
    parts = [part for part in comparison.parts if part is not None]
    low = [part for part in parts if isinstance(part, LowRank)]
    if len(low) == len(parts) > 0:
        yield from _by_factors(comparison, evidence, weights, low)
    elif isinstance(comparison.found, LowRank):
        rank = comparison.found.left.shape[1]
        if 0 < rank < min(comparison.shape) and comparison.distance_in_span(weights) <= evidence.tolerance:
            yield {"verdict": Verdict.TRUNCATED, "rank": rank}


def _explains(evidence: Evidence, residual: float, size: float = 1.0) -> bool:
    """Whether rounding explains what is left, and most of F is explained."""
    return residual <= evidence.tolerance * max(1.0, abs(size)) and residual**2 <= evidence.found**2 / 2


def _by_factors(
    comparison: ComparedTensor, evidence: Evidence, weights: Sequence[float], low: Sequence[LowRank]
) -> Iterator[dict[str, Any]]:
    """The explanations that depend on the factors of the updates."""
    if 2 <= len(low) <= _MANY and len({part.left.shape[1] for part in low}) == 1:
        products, residual = _products(comparison, evidence, low)
        if _explains(evidence, residual, float(products.abs().max())):
            yield {"verdict": Verdict.APART}
    rows, columns = comparison.shape
    used = [w for w, part in zip(weights, comparison.parts, strict=True) if part is not None]
    if rows == columns:
        left = torch.cat([w * part.left for w, part in zip(used, low, strict=True)], 1)
        right = torch.cat([part.right for part in low])
        inner = float(comparison.project(right.T, left).diagonal().sum())
        energy = float(((left.T @ left) * (right @ right.T)).sum())
        if _explains(evidence, math.sqrt(max(0.0, evidence.found**2 + energy - 2 * inner))):
            yield {"verdict": Verdict.TRANSPOSED}
    rank, residual, total = _truncation(comparison, evidence, used, low)
    if rank < total and _explains(evidence, residual):
        yield {"verdict": Verdict.TRUNCATED, "rank": rank}


def _products(comparison: ComparedTensor, evidence: Evidence, low: Sequence[LowRank]) -> tuple[Tensor, float]:
    """The best F ≈ Σ x_nm left_n right_m: x and what is left over."""
    n, r = len(low), low[0].left.shape[1]
    L, R = torch.cat([part.left for part in low], 1), torch.cat([part.right for part in low])
    target = torch.einsum("nimi->nm", comparison.project(L, R.T).view(n, r, n, r)).flatten()
    LL, RR = (L.T @ L).view(n, r, n, r), (R @ R.T).view(n, r, n, r)
    gram = torch.einsum("nikj,milj->nmkl", LL, RR).reshape(n * n, n * n)
    x = torch.linalg.pinv(gram, hermitian=True, rtol=1e-12) @ target
    return x.view(n, n), math.sqrt(max(0.0, evidence.found**2 - 2 * float(x @ target) + float(x @ gram @ x)))


def _truncation(
    comparison: ComparedTensor, evidence: Evidence, weights: Sequence[float], low: Sequence[LowRank]
) -> tuple[int, float, int]:
    """The rank k for which the best approximation of the claim by rank k is closest to F, what is left over, and the
    rank of the claim.
    """
    U, left = orthonormal_basis([w * part.left for w, part in zip(weights, low, strict=True)])
    V, right = orthonormal_basis([part.right.T for part in low])
    core = torch.cat(left, 1) @ torch.cat(right, 1).T
    P, singular, Q = torch.linalg.svd(core, full_matrices=False)
    inner = comparison.project(U.times(P), V.times(Q.T)).diagonal()
    total = int((singular > 1e-10 * singular[0]).sum()) if len(singular) else 0
    squares = evidence.found**2 + (singular.square() - 2 * singular * inner).cumsum(0)
    if not total:
        return 0, math.inf, 0
    k = int(squares[:total].argmin())
    return k + 1, math.sqrt(max(0.0, float(squares[k]))), total


def named(found: Sequence[float], weights: Sequence[float], scalings: Sequence[Scaling]) -> str:
    """The mistake that gives these weights in place of the claimed ones; empty if none of the usual ones does.

    >>> named([2.0], [1.0], [Scaling(0.5, 16)]), named([1.0, 1.0], [0.5, 0.5], [Scaling()] * 2)
    ('the scaling alpha/r was left out', 'the updates were added up with weight 1 each')
    """
    count, w = len(weights), list(weights)
    s, roots = [each.scaling for each in scalings], [math.sqrt(max(1, each.rank)) for each in scalings]
    rule = "alpha/√r" if all(each.uses_rslora for each in scalings) else "alpha/r"
    ways = {
        f"the scaling {rule} was left out": [a / b if b else math.nan for a, b in zip(w, s, strict=True)],
        "the updates were added up with weight 1 each": [1.0] * count,
        "the updates were averaged with equal weights": [1 / count] * count,
        "the update was added twice": [2 * each for each in w],
        "the update was subtracted": [-each for each in w],
        "scaled by alpha/√r in place of alpha/r (rsLoRA)": [
            a if each.uses_rslora else a * root for a, each, root in zip(w, scalings, roots, strict=True)
        ],
        "scaled by alpha/r in place of alpha/√r (rsLoRA)": [
            a / root if each.uses_rslora else a for a, each, root in zip(w, scalings, roots, strict=True)
        ],
        "the scaling was applied twice": [a * b for a, b in zip(w, s, strict=True)],
        "the weights were divided by the number of experts": [each / count for each in w],
    }
    if 1 < count <= 5:
        for order in permutations(w):
            ways.setdefault("the weights are in another order", list(order)) if _close(found, order) else None
    for n in range(count) if count > 1 else ():
        for value in (w[n], 1.0):
            alone = [value if place == n else 0.0 for place in range(count)]
            if _close(found, alone):
                ways.setdefault(f"only expert {n + 1} was added, at weight {value:g}", alone)
    return next((reason for reason, way in ways.items() if _close(found, way) and not _close(w, way)), "")


def _close(found: Sequence[float], wanted: Sequence[float]) -> bool:
    scale = max(map(abs, wanted), default=0.0)
    return all(abs(a - b) <= _CLOSE * scale for a, b in zip(found, wanted, strict=True))
