"""Cosine similarities as sums over tensors: scores, contributions of the tensors, and standard errors.

A measure of the store embeds expert n as e_n with parts e_nt, one for each of T tensors. The score of a candidate is
the cosine of the whole embeddings,

    score_n = Σ_t ⟨e_t, e_nt⟩ / √(Σ_t ‖e_t‖² · Σ_t ‖e_nt‖²).

Only inner products are needed, even if the mean ē of a pool is subtracted from all embeddings:
⟨a − ē, b − ē⟩ = ⟨a, b⟩ − ⟨a, ē⟩ − ⟨b, ē⟩ + ‖ē‖².
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

MIN_TO_CENTRE = 3


@dataclass(frozen=True)
class Similarity:
    """Similarity of the target's embedding to those of n candidates, by T tensors.

    Attributes:
        tensors: names of the T tensors.
        products: (n × T) inner products of the candidates with the target.
        own: (1 × T) squared norms of the target.
        norms: (n × T) squared norms of the candidates.
    """

    tensors: list[str]
    products: Array
    own: Array
    norms: Array

    def scores(self) -> Array:
        """Return (n) cosines in [−1, 1]; 0 where an embedding is zero.

        >>> one = np.ones((1, 2))
        >>> Similarity(["a", "b"], one * 0.5, one, one).scores().item()
        0.5
        """
        return self._cosines(np.ones((1, len(self.tensors))))[:, 0]

    def contributions(self) -> Array:
        """Return (n × T) contributions of the tensors, which sum to the score."""
        scale = np.sqrt(self.own.sum(1) * self.norms.sum(1))
        return self.products / np.where(scale > 0, scale, np.inf)[:, None]

    def errors(self, draws: int = 200, seed: int = 0) -> Array:
        """Return (n) standard errors of the scores by a bootstrap over tensors; large if few tensors decide."""
        count = len(self.tensors)
        if count < 2:
            return np.zeros(len(self.products))
        weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws)
        spread: Array = self._cosines(weights.astype(float)).std(1, ddof=1)
        return spread

    def _cosines(self, weights: Array) -> Array:
        """Return (n × draws) cosines with each tensor counted ``weights`` (draws × T) times."""
        norms = _inner(self.own, weights) * _inner(self.norms, weights)
        return np.clip(_inner(self.products, weights) / np.sqrt(np.where(norms > 0, norms, np.inf)), -1, 1)


@dataclass(frozen=True)
class InnerProducts:
    """Inner products of the parts of one tensor, for the target and then the n candidates.

    Attributes:
        target: (1 + n) inner products with the target's part.
        norms: (1 + n) squared norms.
        mean: (1 + n) inner products with the mean of the pool; zeros if no mean is subtracted.
        whole: the squared norm of that mean.
    """

    target: Array
    norms: Array
    mean: Array
    whole: float

    @classmethod
    def around(
        cls, target: Array, norms: Array, total: Array, candidates: int, pool: Sequence[int], sampled: bool = False
    ) -> InnerProducts:
        """Build them from the inner products of all N embeddings with the target, themselves, and the pool's sum.

        Args:
            total: (N) inner products with the sum of the embeddings in ``pool``.
            sampled: whether ``pool`` is a random sample e_1 … e_n of a much larger pool, whose mean is meant. The
                squared norm of the sample's mean is then too large, in expectation by 1/n of the variance of the
                embeddings, which would lift all scores. The mean of ⟨e_i, e_j⟩ over i ≠ j has no bias:

                    (‖Σ_j e_j‖² − Σ_j ‖e_j‖²) / (n (n − 1)).
        """
        count, size, chosen = 1 + candidates, len(pool), list(pool)
        if not has_mean(pool):
            return cls(target[:count], norms[:count], np.zeros(count), 0.0)
        of_sum, of_each = total[chosen].sum(), norms[chosen].sum()
        whole = (of_sum - of_each) / (size * (size - 1)) if sampled else of_sum / size**2
        return cls(target[:count], norms[:count], total[:count] / size, float(whole))


def has_mean(pool: Sequence[int]) -> bool:
    """Whether the mean of a pool is subtracted; not of two members, which are exactly opposite around their mean."""
    return len(pool) >= MIN_TO_CENTRE


def from_products(products: Iterable[tuple[str, InnerProducts]], candidates: int) -> Similarity:
    """Return the similarity of the target to the candidates from (tensor, inner products)."""
    names: list[str] = []
    crossed, own, norms = [np.zeros((0, candidates))], [np.zeros(0)], [np.zeros((0, candidates))]
    for name, parts in products:
        noise = 1e-12 * parts.norms.max()
        with_target = _without_noise(parts.target - parts.mean - parts.mean[0] + parts.whole, noise)
        squares = np.maximum(_without_noise(parts.norms - 2 * parts.mean + parts.whole, noise), 0)
        names.append(name)
        crossed.append(with_target[None, 1:])
        own.append(squares[:1])
        norms.append(squares[None, 1:])
    return Similarity(names, np.concatenate(crossed).T, np.concatenate(own)[None], np.concatenate(norms).T)


def from_vectors(
    parts: Iterable[tuple[str, Array]], candidates: int, pool: Sequence[int] = (), sampled: bool = False
) -> Similarity:
    """Return the similarity of the first of N embeddings to those after it.

    Args:
        parts: (tensor, parts of the target, the candidates and any others as rows (N × numbers)).
        candidates: how many of the N embeddings are candidates.
        pool: indices of the embeddings whose mean is subtracted from all; no mean is subtracted for fewer than three.
        sampled: whether the pool is a sample of a much larger one, see :meth:`InnerProducts.around`.

    >>> parts = np.array([[1.0, 0.0], [3.0, 4.0]])
    >>> from_vectors([("q", parts)], 1).scores().tolist()
    [0.6]
    """

    def of_rows(rows: Array) -> InnerProducts:
        target, total = _inner(np.stack([rows[0], rows[list(pool)].sum(0)]), rows)
        return InnerProducts.around(target, np.einsum("ij,ij->i", rows, rows), total, candidates, pool, sampled)

    return from_products(((name, of_rows(rows)) for name, rows in parts), candidates)


def from_grams(
    grams: Iterable[tuple[str, Array]], candidates: int, pool: Sequence[int] = (), sampled: bool = False
) -> Similarity:
    """Return the same from the inner products of the embeddings.

    Args:
        grams: (tensor, inner products of the parts (N × N)).

    >>> gram = np.array([[1.0, 0.5], [0.5, 1.0]])
    >>> from_grams([("q", gram)], 1).scores().tolist()
    [0.5]
    """

    def of_gram(gram: Array) -> InnerProducts:
        return InnerProducts.around(gram[0], gram.diagonal(), gram[:, list(pool)].sum(1), candidates, pool, sampled)

    return from_products(((name, of_gram(gram)) for name, gram in grams), candidates)


def _inner(rows: Array, others: Array) -> Array:
    """Return (n × m) inner products, the same for equal rows up to the last digit, which BLAS does not guarantee."""
    products: Array = np.einsum("it,jt->ij", rows, others)
    return products


def _without_noise(values: Array, noise: float) -> Array:
    """Set values that are zero up to rounding to zero, so that copies of one expert get no scores from noise."""
    return np.where(np.abs(values) <= noise, 0.0, values)  # NaN is kept


def balanced(parts: Sequence[Similarity], names: Sequence[str]) -> Similarity:
    """Return the mean of several cosines as one similarity with the tensors of all parts.

    Args:
        names: names of the parts, appended to the names of their tensors.

    >>> one = np.ones((1, 1))
    >>> halves = [Similarity(["q"], one * cosine, one, one) for cosine in (0.25, 0.75)]
    >>> balanced(halves, ["gradients", "update"]).scores().item()
    0.5
    """
    share = 1 / len(parts)
    return Similarity(
        [f"{tensor} ({name})" for part, name in zip(parts, names, strict=True) for tensor in part.tensors],
        np.concatenate([share * part.contributions() for part in parts], 1),
        # a part that is zero keeps its share of the norm, so that its cosine counts as 0
        np.concatenate([_shares(part.own, share) for part in parts], 1),
        np.concatenate([_shares(part.norms, share) for part in parts], 1),
    )


def _shares(squares: Array, total: float) -> Array:
    """Scale rows to the sum ``total``; a row of zeros becomes a row of equal numbers."""
    whole = squares.sum(1, keepdims=True)
    return total * np.where(whole > 0, squares / np.where(whole > 0, whole, 1.0), 1 / squares.shape[1])


def unit(rows: Array) -> Array:
    """Scale rows (N × numbers) to norm 1 in place; a row of zeros stays zero."""
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    return np.divide(rows, np.where(norms > 0, norms, np.inf), out=rows)
