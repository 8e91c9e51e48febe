"""Similarities that are sums over tensors: scores, what each tensor adds to them, and their errors.

A measure of the store embeds an expert as e_n, in parts e_nt, one for each of T tensors; the score of a candidate
is the cosine of the whole embeddings,

    score_n = Σ_t ⟨e_t, e_nt⟩ / √(Σ_t ‖e_t‖² · Σ_t ‖e_nt‖²).

Inner products are all that it takes, also around the mean ē of a pool, which is subtracted from all of them:
⟨a − ē, b − ē⟩ = ⟨a, b⟩ − ⟨a, ē⟩ − ⟨b, ē⟩ + ‖ē‖².
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

MIN_TO_CENTRE = 3


@dataclass(frozen=True)
class Similarity:
    """The target's embedding against n candidates', over T tensors.

    Attributes:
        tensors: names, T of them.
        products: (n × T) inner products with the target.
        own: (1 × T) squared norms of the target.
        norms: (n × T) squared norms of the candidates.
    """

    tensors: list[str]
    products: Tensor
    own: Tensor
    norms: Tensor

    def scores(self) -> Tensor:
        """(n) cosines in [−1, 1]; 0 where an embedding is zero.

        >>> one = torch.ones(1, 2, dtype=torch.float64)
        >>> Similarity(["a", "b"], one * 0.5, one, one).scores().item()
        0.5
        """
        return self._cosines(torch.ones(1, len(self.tensors), dtype=torch.float64))[:, 0]

    def contributions(self) -> Tensor:
        """(n × T) what each tensor adds to the score; they sum to it."""
        scale = (self.own.sum(1) * self.norms.sum(1)).sqrt()
        return self.products / torch.where(scale > 0, scale, torch.inf)[:, None]

    def errors(self, draws: int = 200, seed: int = 0) -> Tensor:
        """(n) standard errors of the scores, from a bootstrap over tensors: how much they hang on a few of them."""
        if len(self.tensors) < 2:
            return torch.zeros(len(self.products), dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        count = len(self.tensors)
        drawn = torch.randint(count, (draws, count), generator=generator)
        weights = torch.zeros(draws, count, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
        )
        return self._cosines(weights).std(1)

    def _cosines(self, weights: Tensor) -> Tensor:
        """(n × draws) cosines with each tensor counted as often as ``weights`` (draws × T) say."""
        norms = (self.own @ weights.T) * (self.norms @ weights.T)
        return (self.products @ weights.T / torch.where(norms > 0, norms, torch.inf).sqrt()).clamp(-1, 1)


@dataclass(frozen=True)
class Products:
    """Inner products of the parts of one tensor: first the target's, then the n candidates'.

    Attributes:
        target: (1 + n) with the target's part.
        norms: (1 + n) with themselves.
        mean: (1 + n) with the mean of the pool; zeros if nothing is to be subtracted.
        whole: () the squared norm of that mean.
    """

    target: Tensor
    norms: Tensor
    mean: Tensor
    whole: Tensor


def has_mean(pool: Sequence[int]) -> bool:
    """Whether the mean of a pool is subtracted: two members are exactly opposite to each other around theirs."""
    return len(pool) >= MIN_TO_CENTRE


def from_products(products: Iterable[tuple[str, Products]]) -> Similarity:
    """The similarity of the target with the candidates around the pool's mean, by (tensor, inner products)."""
    names, crossed, own, norms = [], [], [], []
    for name, parts in products:
        noise = 1e-12 * parts.norms.max()
        with_target = _without_noise(parts.target - parts.mean - parts.mean[0] + parts.whole, noise)
        squares = _without_noise(parts.norms - 2 * parts.mean + parts.whole, noise).clamp(min=0)
        names.append(name)
        crossed.append(with_target[1:])
        own.append(squares[0])
        norms.append(squares[1:])
    return Similarity(names, torch.stack(crossed, 1), torch.stack(own)[None], torch.stack(norms, 1))


def from_vectors(parts: Iterable[tuple[str, Tensor]], candidates: int, pool: Sequence[int] = ()) -> Similarity:
    """The similarity of the first of N embeddings with those after it.

    Args:
        parts: (tensor, (N × numbers) the parts of the target, the candidates, and any others).
        candidates: how many of the N are candidates.
        pool: the embeddings whose mean is subtracted from all; of less than three, nothing is.

    >>> parts = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    >>> from_vectors([("q", parts)], 1).scores().tolist()
    [0.6]
    """
    return from_products((name, _of_vectors(rows.double(), 1 + candidates, list(pool))) for name, rows in parts)


def from_grams(grams: Iterable[tuple[str, Tensor]], candidates: int, pool: Sequence[int] = ()) -> Similarity:
    """The same for embeddings of which only the inner products are known.

    Args:
        grams: (tensor, (N × N) inner products of the parts).

    >>> gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    >>> from_grams([("q", gram)], 1).scores().tolist()
    [0.5]
    """
    return from_products((name, _of_gram(gram.double(), 1 + candidates, list(pool))) for name, gram in grams)


def _of_vectors(rows: Tensor, count: int, pool: list[int]) -> Products:
    mean = rows[pool].mean(0) if has_mean(pool) else torch.zeros_like(rows[0])
    rows = rows[:count]
    return Products(rows @ rows[0], rows.square().sum(1), rows @ mean, mean @ mean)


def _of_gram(gram: Tensor, count: int, pool: list[int]) -> Products:
    mean = gram[:, pool].mean(1) if has_mean(pool) else torch.zeros_like(gram[0])
    whole = mean[pool].mean() if has_mean(pool) else torch.zeros_like(mean[0])
    return Products(gram[0, :count], gram.diagonal()[:count], mean[:count], whole)


def _without_noise(values: Tensor, noise: Tensor) -> Tensor:
    """What cancels but for rounding is zero: else copies of one expert would get scores from noise."""
    return torch.where(values.abs() > noise, values, 0.0)


def balanced(parts: Sequence[Similarity], names: Sequence[str]) -> Similarity:
    """The mean of several cosines, as one similarity whose tensors are those of all parts.

    Args:
        names: of the parts, put behind their tensors' names.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> halves = [Similarity(["q"], one * cosine, one, one) for cosine in (0.25, 0.75)]
    >>> balanced(halves, ["gradients", "update"]).scores().item()
    0.5
    """
    share = 1 / len(parts)

    def over(values: Tensor, whole: Tensor) -> Tensor:
        return share * values / torch.where(whole > 0, whole, torch.inf)

    own = [part.own.sum(1, keepdim=True) for part in parts]
    norms = [part.norms.sum(1, keepdim=True) for part in parts]
    return Similarity(
        [f"{tensor} ({name})" for part, name in zip(parts, names, strict=True) for tensor in part.tensors],
        torch.cat([over(part.products, (o * n).sqrt()) for part, o, n in zip(parts, own, norms, strict=True)], 1),
        # a part that is zero keeps its share of the norm: its cosine counts as 0
        torch.cat([_shares(part.own, share) for part in parts], 1),
        torch.cat([_shares(part.norms, share) for part in parts], 1),
    )


def _shares(squares: Tensor, total: float) -> Tensor:
    """Rows that sum to ``total``, in proportion; equal ones for a row of zeros."""
    whole = squares.sum(1, keepdim=True)
    return total * torch.where(whole > 0, squares / torch.where(whole > 0, whole, 1.0), 1 / squares.shape[1])


def unit(parts: Tensor) -> Tensor:
    """(N × numbers) rows of norm 1, in float64; a row that is zero stays so."""
    parts = parts.double()
    norms = parts.norm(dim=1, keepdim=True)
    return parts / torch.where(norms > 0, norms, torch.inf)
