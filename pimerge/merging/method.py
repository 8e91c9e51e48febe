"""The family of merge methods, and a merge method with its options and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pimerge.core.plugins import Family, Strategy

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Space(StrEnum):
    """The tensors that a merge method works on.

    - ``LINEAR``: a weighted sum. The method has ``coefficients`` instead of ``merge``. The sum is computed on the
      factors, exactly and without forming ΔW.
    - ``SPECTRAL``: small cores UᵀΔW_nV in orthonormal bases that the experts share, (experts, R, R') → (R, R').
      The method commutes with every rotation of rows and columns, so merging the cores equals merging ΔW.
    - ``ROWS``: UᵀΔW_n, (experts, R, d_in) → (R, d_in). The method commutes with every rotation of the rows.
    - ``REFERENCE``: cores in the bases of Core Space, the singular vectors of the stacked factors.
    - ``ELEMENTWISE``: single entries, so the basis matters. The user chooses the cores in the basis of the experts'
      singular vectors, the dense ΔW, or the factors.
    - ``FACTORS``: the parameters, (experts, *shape) → (*shape). The experts share an init.
    - ``INPUTS``: the rows of the factors A, with the Gram matrix of the layer's inputs for each expert. The method
      has ``transformed`` instead of ``merge``.
    """

    LINEAR = "linear"
    SPECTRAL = "spectral"
    ROWS = "rows"
    REFERENCE = "reference"
    ELEMENTWISE = "elementwise"
    FACTORS = "factors"
    INPUTS = "inputs"

    @property
    def takes_any_tensor(self) -> bool:
        """Whether the method merges tensors of any shape, such as full checkpoints; otherwise it needs ΔW."""
        return self in (Space.LINEAR, Space.ELEMENTWISE, Space.FACTORS)


def mean(count: int, given: Sequence[float] | None) -> list[float]:
    """Return the given weights, or 1/N each.

    >>> mean(4, None)
    [0.25, 0.25, 0.25, 0.25]
    """
    return [1 / count] * count if given is None else list(given)


@dataclass(frozen=True, kw_only=True)
class MergeMethod(Strategy):
    """A way to merge the updates of several experts into one.

    Attributes:
        formula: the merged update as a formula.
        paper: the source of the method.
        space: the tensors that it works on. They determine which of the three functions it has.
        weights: (number of experts, given weights or None) → the weight of each expert.
        coefficients: (weights, *, needs, options) → the coefficient of each update, (experts) → (experts).
        transformed: (rows of A per expert, weights, *, needs, options) → transformed rows, whose products with the B_n
            sum to the merged update.
        merge: (tensors, weights, *, needs, options) → the merged tensor, (experts, *shape), (experts) → (*shape).
        needs: keyword arguments of the function in addition to its options: ``inner`` (⟨ΔW_i, ΔW_j⟩, experts ×
            experts), ``limit`` (min(d_out, d_in)), ``generators`` (one per expert, seeded), ``fishers`` or ``grams``.
        breaks: laws of merging that the method breaks by definition → the reason. The laws: ``identity`` (one expert
            at weight 1 comes back), ``copies`` (N equal experts with weights that sum to 1 give that expert),
            ``order`` (the order of the experts does not matter), ``gauge`` (factors (BR, R⁻¹A) give the same merge).
        joins_target: whether the target's own expert is added to the experts that the ranking selected.
        weights_by_score: whether the default weights follow the scores of the ranking.
        averages: whether the method averages parameters, so that the base cancels if the weights sum to 1.
        check: refuses options that contradict each other; the range of a single option is checked before.
    """

    formula: str
    paper: str
    space: Space
    weights: Callable[[int, Sequence[float] | None], list[float]] = mean
    coefficients: Callable[..., Tensor] | None = None
    transformed: Callable[..., list[Tensor]] | None = None
    merge: Callable[..., Tensor] | None = None
    needs: tuple[str, ...] = ()
    breaks: Mapping[str, str] = field(default_factory=dict)
    joins_target: bool = False
    weights_by_score: bool = False
    averages: bool = False
    check: Callable[[Mapping[str, Any]], None] = lambda options: None

    @property
    def function(self) -> Callable[..., Any]:
        """The one function that the method has."""
        function = self.coefficients or self.transformed or self.merge
        assert function is not None
        return function


METHODS = Family("pimerge.merging.methods", "merge method", "METHOD", MergeMethod)


@dataclass(frozen=True)
class OpenedMethod:
    """A merge method with its options and seed; see :func:`open_method`.

    Attributes:
        options: name → value, for every option of the method.
        seed: random seed.
    """

    strategy: MergeMethod
    options: Mapping[str, Any]
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of the method."""
        return self.strategy.name

    @property
    def space(self) -> Space:
        """The tensors that the method works on."""
        return self.strategy.space

    @property
    def needs(self) -> tuple[str, ...]:
        """The data that the method needs besides updates and weights."""
        return self.strategy.needs

    def weights(self, count: int, given: Sequence[float] | None) -> list[float]:
        """Return the weight of each expert."""
        return self.strategy.weights(count, given)

    def coefficients(self, weights: Tensor, inner: Callable[[], Tensor]) -> Tensor:
        """Return the coefficient of each update, for a linear method; ``inner`` computes ⟨ΔW_i, ΔW_j⟩ if needed."""
        needed = {"inner": inner()} if "inner" in self.needs else {}
        found: Tensor = self.strategy.function(weights, **needed, **self.options)
        return found

    def transformed(self, rows: Sequence[Tensor], weights: Tensor, grams: Sequence[Tensor]) -> list[Tensor]:
        """Return the transformed rows of A, for a method that works on the layer's inputs."""
        found: list[Tensor] = self.strategy.function(rows, weights, grams=grams, **self.options)
        return found

    def merge(
        self, deltas: Tensor, weights: Tensor, *, draws: Sequence[str] = (), limit: int = 0, **given: Tensor
    ) -> Tensor:
        """Return the merged tensor, for all other methods: (experts, *shape), (experts) → (*shape).

        Args:
            draws: one text per expert, which seeds its generator together with the seed of the method.
            limit: min(d_out, d_in).
            given: ``fishers``, if the method needs them.
        """
        needed: dict[str, Any] = dict(given)
        if "generators" in self.needs:
            needed["generators"] = [self._generator(text) for text in draws]
        if "limit" in self.needs:
            needed["limit"] = limit
        merged: Tensor = self.strategy.function(deltas, weights, **needed, **self.options)
        return merged

    def _generator(self, text: str) -> torch.Generator:
        import torch

        digest = hashlib.sha256(f"{self.seed} {text}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def open_method(name: str, options: Mapping[str, Any] | None = None, seed: int = 0) -> OpenedMethod:
    """Open a merge method by name, and check its options.

    Args:
        options: name → value; None stands for an option that was not given.

    >>> open_method("ties", {"density": 0.5, "gamma": None}).options
    {'density': 0.5, 'scale': 1.0}
    """
    strategy = METHODS.load(name)
    chosen = {**strategy.defaults, **METHODS.given_options(strategy, options or {})}
    strategy.check(chosen)
    return OpenedMethod(strategy, chosen, seed)
