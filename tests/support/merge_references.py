"""Every merge method once more, slow and obvious, on dense updates: the oracle of the tests.

``REFERENCES[name](deltas, weights, **options)`` takes ΔW of one module (experts, d_out, d_in) and one weight per
expert, and gives the merged ΔW (d_out, d_in), in float64 numpy. Random methods take the ``masks`` of what is kept,
``fisher`` the ``fishers``, ``regmean`` the ``grams`` and ``core-space`` the experts' ``factors``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
NULL = 1e-6


def arrays(tensors: Any) -> list[Array]:
    """Each tensor in float64."""
    return [np.asarray(tensor, dtype=np.float64) for tensor in tensors]


def sum_of(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    """Σ w_n ΔW_n."""
    total = np.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total = total + float(weight) * delta
    return total


def ranked(delta: Array) -> list[tuple[int, ...]]:
    """The indices of the entries from the largest to the smallest, equal ones in order."""
    return sorted(np.ndindex(delta.shape), key=lambda index: -abs(delta[index]))


def only(delta: Array, indices: Sequence[tuple[int, ...]]) -> Array:
    """The entries at the indices, 0 elsewhere."""
    kept = np.zeros_like(delta)
    for index in indices:
        kept[index] = delta[index]
    return kept


def trimmed(delta: Array, density: float) -> Array:
    """The ``density`` share of largest entries."""
    return only(delta, ranked(delta)[: max(1, int(density * delta.size))])


def elected(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    """Entry by entry: the mean over those that agree with the sign of the sum."""
    merged = np.zeros_like(deltas[0])
    for index in np.ndindex(merged.shape):
        parts = [
            (float(weight) * delta[index], abs(float(weight))) for delta, weight in zip(deltas, weights, strict=True)
        ]
        upwards = sum(part for part, _ in parts) >= 0
        agreeing = [(part, mass) for part, mass in parts if (part > 0 if upwards else part < 0)]
        if agreeing:
            merged[index] = sum(part for part, _ in agreeing) / sum(mass for _, mass in agreeing)
    return merged


def triples(delta: Array, null: float) -> list[tuple[Array, float, Array]]:
    """(u, σ, v) of the dense matrix, without those below a share of its norm."""
    U, S, Vh = np.linalg.svd(delta)
    return [(U[:, i], s, Vh[i]) for i, s in enumerate(S) if s > null * np.linalg.norm(delta)]


def nearest_orthonormal(columns: Sequence[Array], length: int) -> Array:
    """X (XᵀX)^(−1/2) by the eigenvalues, null directions left out."""
    X = np.stack(list(columns), axis=1) if len(columns) else np.zeros((length, 0))
    values, vectors = np.linalg.eigh(X.T @ X)
    kept = values > NULL**2 * len(values)
    return X @ vectors[:, kept] @ np.diag(values[kept] ** -0.5) @ vectors[:, kept].T


def uniform(deltas: Tensor, weights: Any) -> Array:
    return sum_of(arrays(deltas), weights)


def task_arithmetic(deltas: Tensor, weights: Any, scale: float = 1.0) -> Array:
    return scale * sum_of(arrays(deltas), weights)


def nan_weights(deltas: Tensor, weights: Any, scale: float = 1.0) -> Array:
    dense = arrays(deltas)
    shares = [float(w) / np.linalg.norm(d) if d.any() else 0.0 for d, w in zip(dense, weights, strict=True)]
    return scale * sum_of(dense, [share / (sum(shares) or 1.0) for share in shares])


def slerp(deltas: Tensor, weights: Any) -> Array:
    """The first expert turned towards the second within the plane of the two."""
    dense = arrays(deltas)
    if len(dense) == 1 or not all(delta.any() for delta in dense):
        return sum_of(dense, weights)
    lengths = [float(np.linalg.norm(delta)) for delta in dense]
    a, b = (delta / length for delta, length in zip(dense, lengths, strict=True))
    angle = 2 * math.atan2(float(np.linalg.norm(a - b)), float(np.linalg.norm(a + b)))
    if angle < 1e-9 or angle > math.pi - 1e-3:
        return sum_of(dense, weights)
    t = float(weights[1])
    return (math.sin((1 - t) * angle) * dense[0] + math.sin(t * angle) * dense[1]) / math.sin(angle)


def ties(deltas: Tensor, weights: Any, density: float = 0.2, scale: float = 1.0) -> Array:
    return scale * elected([trimmed(delta, density) for delta in arrays(deltas)], weights)


def magnitude(deltas: Tensor, weights: Any, density: float = 0.5, scale: float = 1.0) -> Array:
    return scale * sum_of([trimmed(delta, density) for delta in arrays(deltas)], weights)


def breadcrumbs(deltas: Tensor, weights: Any, density: float = 0.9, gamma: float = 0.01, scale: float = 1.0) -> Array:
    crumbs = []
    for delta in arrays(deltas):
        kept = max(1, int(density * delta.size))
        top = min(int(gamma * delta.size), delta.size - kept)
        crumbs.append(only(delta, ranked(delta)[top : top + kept]))
    return scale * sum_of(crumbs, weights)


def dropped(deltas: Tensor, masks: Any, density: float) -> list[Array]:
    """What the masks keep, divided by the density."""
    return [delta * mask / density for delta, mask in zip(arrays(deltas), arrays(masks), strict=True)]


def dare_linear(deltas: Tensor, weights: Any, *, masks: Any, density: float = 0.5, scale: float = 1.0) -> Array:
    return scale * sum_of(dropped(deltas, masks, density), weights)


def dare_ties(deltas: Tensor, weights: Any, *, masks: Any, density: float = 0.5, scale: float = 1.0) -> Array:
    return scale * elected(dropped(deltas, masks, density), weights)


def della(
    deltas: Tensor, weights: Any, *, masks: Any, density: float = 0.5, epsilon: float = 0.1, scale: float = 1.0
) -> Array:
    kept = []
    for delta, mask in zip(arrays(deltas), arrays(masks), strict=True):
        out = np.zeros_like(delta)
        for row, entries in enumerate(delta):
            order = sorted(range(len(entries)), key=lambda i, entries=entries: abs(entries[i]))  # type: ignore[misc]
            for rank, i in enumerate(order):
                step = 0.0 if len(order) == 1 or density == 1 else epsilon * (2 * rank / (len(order) - 1) - 1)
                out[row, i] = entries[i] * mask[row, i] / (density + step)
        kept.append(out)
    return scale * elected(kept, weights)


def tsv(deltas: Tensor, weights: Any, scale: float = 1.0) -> Array:
    dense = arrays(deltas)
    k = max(1, min(dense[0].shape) // len(dense))
    parts = [
        (u, float(weight) * s, v) for d, weight in zip(dense, weights, strict=True) for u, s, v in triples(d, 1e-12)[:k]
    ]
    left = nearest_orthonormal([u for u, _, _ in parts], dense[0].shape[0])
    right = nearest_orthonormal([v for _, _, v in parts], dense[0].shape[1])
    return scale * left @ np.diag([s for _, s, _ in parts]) @ right.T


def iso_c(deltas: Tensor, weights: Any, scale: float = 1.0) -> Array:
    total = sum_of(arrays(deltas), weights)
    parts = triples(total, NULL)
    mean = sum(s for _, s, _ in parts) / max(1, len(parts))
    return scale * mean * sum((np.outer(u, v) for u, _, v in parts), np.zeros_like(total))


def iso_cts(deltas: Tensor, weights: Any, common: float = 0.8, scale: float = 1.0) -> Array:
    dense = arrays(deltas)
    total = sum_of(dense, weights)
    found = triples(total, NULL)
    k = round(common * len(found))
    own = (len(found) - k) // len(dense)
    parts = found[:k]
    for delta, weight in zip(dense, weights, strict=True):
        rest = float(weight) * delta
        for u, _, _ in found[:k]:
            rest = rest - np.outer(u, u @ rest)
        floor = NULL * np.linalg.norm(float(weight) * delta)
        parts = parts + [triple for triple in triples(rest, 0.0) if triple[1] > floor][:own]
    if not parts:
        return np.zeros_like(total)
    left = nearest_orthonormal([u for u, _, _ in parts], total.shape[0])
    right = nearest_orthonormal([v for _, _, v in parts], total.shape[1])
    return scale * sum(s for _, s, _ in parts) / len(parts) * left @ right.T


def wudi(deltas: Tensor, weights: Any) -> Array:
    """The normal equations of the quadratic, ΔW H = Σ w_n ΔW_n H_n/‖ΔW_n‖², solved with the pseudo-inverse."""
    dense = [(d, float(w)) for d, w in zip(arrays(deltas), weights, strict=True) if d.any()]
    if not dense:
        return np.zeros(deltas.shape[1:])
    grams = [w * d.T @ d / np.linalg.norm(d) ** 2 for d, w in dense]
    right = sum(d @ gram for (d, _), gram in zip(dense, grams, strict=True))
    return np.asarray(right @ np.linalg.pinv(sum(grams), rcond=1e-12, hermitian=True))


def knots(deltas: Tensor, weights: Any, inner_method: str = "ties", density: float = 0.2, scale: float = 1.0) -> Array:
    dense = arrays(deltas)
    U, S, Vh = np.linalg.svd(np.concatenate(dense, axis=1), full_matrices=False)
    rank = sum(s > NULL * np.linalg.norm(S) for s in S)
    if not rank:
        return np.zeros_like(dense[0])
    parts = np.split(np.where(np.abs(Vh[:rank]) > 1e-10, Vh[:rank], 0), len(dense), axis=1)
    merged = (
        elected([trimmed(V, density) for V in parts], weights) if inner_method == "ties" else sum_of(parts, weights)
    )
    return np.asarray(scale * U[:, :rank] @ np.diag(S[:rank]) @ merged)


def core_space(
    deltas: Tensor,
    weights: Any,
    *,
    factors: Sequence[tuple[Tensor, Tensor]],
    inner_method: str = "ties",
    **options: Any,
) -> Array:
    """With ΔW_n = B_n A_n for the (B_n, A_n) of ``factors``."""
    U, V = reference_bases(factors)
    cores = np.stack([U.T @ B @ A @ V for B, A in map(arrays, factors)])
    if inner_method == "tsv":  # its number of triples is that of the whole matrix
        return options.get("scale", 1.0) * tsv(torch.as_tensor(U @ cores @ V.T), weights)
    inner = {"ties": ties, "linear": task_arithmetic, "iso-c": iso_c}[inner_method]
    return np.asarray(U @ inner(torch.as_tensor(cores), weights, **options) @ V.T)


def reference_bases(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Array, Array]:
    """U_B of [B_1 … B_N] and V_A of the stacked A_n."""
    B, A = (
        np.concatenate(parts, axis=axis)
        for parts, axis in zip(zip(*map(arrays, factors), strict=True), (1, 0), strict=True)
    )
    U, _, _ = np.linalg.svd(B, full_matrices=False)
    _, _, Vh = np.linalg.svd(A, full_matrices=False)
    return U[:, : np.linalg.matrix_rank(B)], Vh[: np.linalg.matrix_rank(A)].T


def fisher(deltas: Tensor, weights: Any, *, fishers: Tensor, floor: float = 1e-6) -> Array:
    dense = arrays(deltas)
    merged = np.zeros_like(dense[0])
    for index in np.ndindex(merged.shape):
        shares = [float(w) * max(f[index], floor) for f, w in zip(arrays(fishers), weights, strict=True)]
        shares = shares if sum(shares) else [float(w) for w in weights]
        merged[index] = sum(s * d[index] for s, d in zip(shares, dense, strict=True)) / sum(shares)
    return merged


def regmean(deltas: Tensor, weights: Any, *, grams: Sequence[Tensor], offdiagonal: float = 0.9) -> Array:
    shares = [float(w) / sum(map(float, weights)) for w in weights]
    softened = [np.where(np.eye(len(gram)) > 0, gram, offdiagonal * gram) for gram in arrays(grams)]
    ridge = 1e-6 * np.trace(sum_of(softened, shares)) / len(softened[0]) or 1.0
    ridged = [gram + ridge * np.eye(len(gram)) for gram in softened]
    right = sum_of([delta @ gram for delta, gram in zip(arrays(deltas), ridged, strict=True)], shares)
    return np.asarray(np.linalg.solve(sum_of(ridged, shares), right.T).T)


def _tensors(function: Callable[..., Array]) -> Callable[..., Tensor]:
    return lambda *args, **options: torch.as_tensor(np.asarray(function(*args, **options)))


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "breadcrumbs": _tensors(breadcrumbs),
    "core-space": _tensors(core_space),
    "dare-linear": _tensors(dare_linear),
    "dare-ties": _tensors(dare_ties),
    "della": _tensors(della),
    "fisher": _tensors(fisher),
    "interpolated": _tensors(uniform),
    "iso-c": _tensors(iso_c),
    "iso-cts": _tensors(iso_cts),
    "knots": _tensors(knots),
    "magnitude": _tensors(magnitude),
    "nan-weights": _tensors(nan_weights),
    "regmean": _tensors(regmean),
    "slerp": _tensors(slerp),
    "task-arithmetic": _tensors(task_arithmetic),
    "ties": _tensors(ties),
    "tsv": _tensors(tsv),
    "uniform": _tensors(uniform),
    "wudi": _tensors(wudi),
}
