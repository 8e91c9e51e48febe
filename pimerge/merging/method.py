"""The family of merge methods, and one of them with the options and the seed of a merge."""

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
    """The space that a merge method works in.

    - ``LINEAR``: a weighted sum. The method has ``coefficients`` in place of ``merge``, so that the sum is taken on
      the factors: nothing is lost, no ΔW is formed.
    - ``SPECTRAL``: small cores UᵀΔW_nV in any orthonormal bases that the experts share, (experts, R, R') → (R, R').
      The method commutes with every rotation of rows and columns, so the cores are as good as ΔW.
    - ``ROWS``: UᵀΔW_n, (experts, R, d_in) → (R, d_in). The method commutes with every rotation of the rows.
    - ``REFERENCE``: cores in the bases of Core Space, the singular vectors of the stacked factors.
    - ``ELEMENTWISE``: single entries, so the basis matters. The user chooses the cores in the basis of the experts'
      own singular vectors, the dense ΔW, or the factors.
    - ``FACTORS``: the parameters themselves, (experts, *shape) → (*shape). The experts share an init.
    - ``INPUTS``: the rows of the experts' factors A, each with the Gram matrix of the layer's inputs. The method has
      ``transformed`` in place of ``merge``.
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
        """Whether the method merges tensors of any shape, such as those of full checkpoints; else it needs ΔW."""
        return self in (Space.LINEAR, Space.ELEMENTWISE, Space.FACTORS)


@dataclass(frozen=True, kw_only=True)
class MergeMethod(Strategy):
    """A way to merge the updates of several experts into one.

    Attributes:
        formula: the merged update as a formula, for listings.
        paper: where it comes from.
        space: what it works on, which decides which one of the three functions it has.
        weights: (number of experts, weights given or None) → the weight of each expert.
        coefficients: (weights, *, needs, options) → the coefficient of each update, (experts) → (experts).
        transformed: (rows of A per expert, weights, *, needs, options) → transformed rows, whose products with the B_n
            sum to the merged update.
        merge: (tensors, weights, *, needs, options) → the merged tensor, (experts, *shape), (experts) → (*shape).
        needs: what the function takes by keyword besides its options: ``inner`` (⟨ΔW_i, ΔW_j⟩, experts × experts),
            ``limit`` (min(d_out, d_in)), ``generators`` (one per expert, seeded), ``fishers`` or ``grams``.
        breaks: laws of merging that it does not keep by definition → why. The laws: ``identity`` (one expert at
            weight 1 comes back), ``copies`` (N equal experts with weights of sum 1 give that expert), ``order`` (of
            the experts does not matter), ``gauge`` (factors (BR, R⁻¹A) give the same merge).
        joins_target: the target's own expert joins those that the ranking selected.
        weights_by_score: weights that are not given follow the scores of the ranking.
        averages: it averages the numbers themselves, so that the base cancels where the weights sum to 1.
        check: refuses options that do not fit each other; the range of a single one is the option's own.
    """

    formula: str
    paper: str
    space: Space
    weights: Callable[[int, Sequence[float] | None], list[float]]
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
        """The one function that it has."""
        function = self.coefficients or self.transformed or self.merge
        assert function is not None
        return function


METHODS = Family("pimerge.merging.methods", "merge method", "METHOD", MergeMethod)


@dataclass(frozen=True)
class OpenedMethod:
    """A merge method with the options and the seed of a merge; see :func:`open_method`.

    Attributes:
        options: name → value, of every option that the method has.
        seed: decides every random draw.
    """

    strategy: MergeMethod
    options: Mapping[str, Any]
    seed: int = 0

    @property
    def name(self) -> str:
        """As the user types it."""
        return self.strategy.name

    @property
    def space(self) -> Space:
        """The space that it works in."""
        return self.strategy.space

    @property
    def needs(self) -> tuple[str, ...]:
        """Its arguments besides the updates and the weights."""
        return self.strategy.needs

    def weights(self, count: int, given: Sequence[float] | None) -> list[float]:
        """The weight of each expert."""
        return self.strategy.weights(count, given)

    def coefficients(self, weights: Tensor, inner: Callable[[], Tensor]) -> Tensor:
        """The coefficient of each update, of a linear method; ``inner`` gives ⟨ΔW_i, ΔW_j⟩ where it is needed."""
        needed = {"inner": inner()} if "inner" in self.needs else {}
        found: Tensor = self.strategy.function(weights, **needed, **self.options)
        return found

    def transformed(self, rows: Sequence[Tensor], weights: Tensor, grams: Sequence[Tensor]) -> list[Tensor]:
        """The transformed rows of A, of a method that works on the layer's inputs."""
        found: list[Tensor] = self.strategy.function(rows, weights, grams=grams, **self.options)
        return found

    def merge(
        self, deltas: Tensor, weights: Tensor, *, draws: Sequence[str] = (), limit: int = 0, **given: Tensor
    ) -> Tensor:
        """The merged tensor, of a method of another space: (experts, *shape), (experts) → (*shape).

        Args:
            draws: a text for each expert that decides its random draws together with the seed.
            limit: min(d_out, d_in).
            given: ``fishers``.
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
    """A merge method by name, with its options checked; all that is wrong with them is said at once.

    Args:
        options: name → value; None for one that was not given.

    >>> open_method("ties", {"density": 0.5, "gamma": None}).options
    {'density': 0.5, 'scale': 1.0}
    """
    strategy = METHODS.load(name)
    chosen = {**strategy.defaults, **METHODS.given_options(strategy, options or {})}
    strategy.check(chosen)
    return OpenedMethod(strategy, chosen, seed)
