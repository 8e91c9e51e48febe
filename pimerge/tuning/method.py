"""The family of tune methods: each file of ``tuning/methods/`` ends in one :class:`TuneMethod`, its ``METHOD``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pimerge.core.plugins import Family, Strategy
from pimerge.tuning.plan import MixturePlan

if TYPE_CHECKING:
    from pimerge.tuning.session import TuneResult


@dataclass(frozen=True, kw_only=True)
class TuneMethod(Strategy):
    """A way to combine experts by training on the target's examples.

    Attributes:
        formula: what the result computes, for listings.
        paper: where the method comes from; empty if it has no paper.
        plan: what is mixed and what trains.
        fit: (request, own options by keyword) → the result, which is still in the base's model; None for methods that
            mix, train once and collapse, as :func:`pimerge.tuning.mix.train_mixture` does.
        without_experts: name of the method that replaces this one when the ranking selects no expert.
        without_names: name of the method that replaces this one, in turn, where the target's classes have no names
            that are texts; empty for methods that need none.
    """

    formula: str
    paper: str = ""
    plan: MixturePlan
    fit: Callable[..., TuneResult] | None = None
    without_experts: str = "scratch"
    without_names: str = ""

    def with_options(self, values: Mapping[str, Any] | None = None) -> TuneMethod:
        """The method with the given values in place of its defaults; wrong ones are refused all at once.

        Args:
            values: name of an option → value; None for an option that was not given.
        """
        given = METHODS.given_options(self, values or {})
        return replace(self, options={option: given.get(option.name, old) for option, old in self.options.items()})


METHODS = Family("pimerge.tuning.methods", "tune method", "METHOD", TuneMethod)


def open_tune_method(name: str, options: Mapping[str, Any] | None = None) -> TuneMethod:
    """Look up a tune method and set its own options.

    Args:
        options: name → value; None for an option that was not given.

    >>> open_tune_method("scalearn", {"uniform": True, "shared": None}).defaults
    {'uniform': True, 'shared': False}
    """
    return METHODS.load(name).with_options(options)
