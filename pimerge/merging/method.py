"""A merge method with its options, as the stages use it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pimerge.core import plugins

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PACKAGE = "pimerge.merging.methods"
_FUNCTIONS = {"linear": "coefficients", "inputs": "transformed"}  # of the other spaces: merge


@dataclass(frozen=True)
class Method:
    """One file of ``merge_methods/`` with its options; see :func:`open_method`.

    Attributes:
        options: those that were given; the file's own defaults serve for the others.
        seed: decides every draw.
    """

    name: str
    file: ModuleType
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def space(self) -> str:
        """What its ``merge`` works on."""
        space: str = self.file.SPACE
        return space

    @property
    def needs(self) -> tuple[str, ...]:
        """What it is given besides the updates and the weights."""
        return getattr(self.file, "NEEDS", ())

    @property
    def breaks(self) -> Mapping[str, str]:
        """The laws that it does not keep by definition, and why."""
        return getattr(self.file, "BREAKS", {})

    @property
    def function(self) -> Callable[..., Any]:
        """``coefficients``, ``transformed`` or ``merge``."""
        function: Callable[..., Any] = getattr(self.file, _FUNCTIONS.get(self.space, "merge"))
        return function

    @property
    def resolved(self) -> dict[str, Any]:
        """Every option with the value that it has."""
        return {**_defaults(self.file), **self.options}

    def weights(self, count: int, given: Sequence[float] | None) -> list[float]:
        """The weight of each expert."""
        weights: list[float] = self.file.weights(count, given)
        return weights

    def coefficients(self, weights: Tensor, inner: Callable[[], Tensor]) -> Tensor:
        """The coefficient of each update, for a linear method; ``inner`` gives ⟨ΔW_i, ΔW_j⟩ if it is needed."""
        needed = {"inner": inner()} if "inner" in self.needs else {}
        found: Tensor = self.function(weights, **needed, **self.options)
        return found

    def merge(
        self, deltas: Tensor, weights: Tensor, *, draws: Sequence[str] = (), limit: int = 0, **given: Tensor
    ) -> Tensor:
        """The merged update, for a method that is not linear: (experts, *shape), (experts) → (*shape).

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
        merged: Tensor = self.function(deltas, weights, **needed, **self.options)
        return merged

    def try_options(self) -> None:
        """Merge one zero, so that an option out of range is refused before any expert is read."""
        import torch

        zero, one = torch.zeros(1, 1, 1), torch.ones(1)
        match self.space:
            case "linear":
                self.coefficients(one, lambda: torch.ones(1, 1))
            case "inputs":
                self.function([zero[0]], one, grams=[torch.ones(1, 1)], **self.options)
            case "factors":
                self.merge(zero, one, fishers=torch.ones(1, 1, 1))
            case _:
                self.merge(zero, one, draws=[""], limit=1)

    def _generator(self, text: str) -> torch.Generator:
        import torch

        digest = hashlib.sha256(f"{self.seed} {text}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def open_method(name: str, options: Mapping[str, Any] | None = None, seed: int = 0) -> Method:
    """A merge method by name, with options.

    Args:
        options: name → value; None for one that was not given.

    Raises:
        PimergeError: if there is no such method, it does not take an option, or not such a value.

    >>> open_method("ties", {"density": 0.5, "gamma": None}).resolved["density"]
    0.5
    """
    file = plugins.load(PACKAGE, name)
    given = plugins.given_options(PACKAGE, name, options, _defaults)
    method = Method(name, file, given, seed)
    method.try_options()
    return method


def _defaults(file: ModuleType) -> dict[str, Any]:
    return plugins.keyword_defaults(getattr(file, _FUNCTIONS.get(file.SPACE, "merge")))
