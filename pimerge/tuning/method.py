"""A tune method with its options, as the stages use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from pimerge.core import plugins
from pimerge.tuning.class_name_examples import class_names, may_take_names, names_predict
from pimerge.tuning.methods import MixturePlan
from pimerge.tuning.mixed_expert import train_mixture
from pimerge.tuning.session import TuneRequest, TuneResult

PACKAGE = "pimerge.tuning.methods"


@dataclass(frozen=True)
class TuneMethod:
    """One file of ``tune_methods/`` with its options; see :func:`open_tune_method`.

    Attributes:
        options: those that were given; the file's own defaults serve for the others.
    """

    name: str
    file: ModuleType
    options: Mapping[str, Any]

    @property
    def plan(self) -> MixturePlan:
        """What it composes."""
        plan: MixturePlan = self.file.PLAN
        return plan

    @property
    def resolved(self) -> dict[str, Any]:
        """Every option of its own with the value that it has."""
        return {**_defaults(self.file), **self.options}

    @property
    def is_one_training(self) -> bool:
        """Whether it trains once, all epochs in a row."""
        return not hasattr(self.file, "fit")

    def fit(self, request: TuneRequest) -> TuneResult:
        """Leave the tuned result in the request's base.

        Raises:
            PimergeError: if the experts, the task, an option or the disk has a problem.
        """
        request = decided(request, self.plan)
        result: TuneResult = (
            train_mixture(request, self.plan, self.name)
            if self.is_one_training
            else self.file.fit(request, **self.options)
        )
        return replace(result, settings={**result.settings, "class_names": request.options.class_names})


def open_tune_method(name: str, options: Mapping[str, Any] | None = None) -> TuneMethod:
    """A tune method by name, with options of its own.

    Args:
        options: name → value; None for one that was not given.

    Raises:
        PimergeError: if there is no such method, or it does not take an option.

    >>> open_tune_method("scalearn", {"uniform": True, "shared": None}).resolved
    {'uniform': True, 'shared': False}
    """
    file = plugins.load(PACKAGE, name)
    given = plugins.given_options(PACKAGE, name, options, _defaults)
    return TuneMethod(name.replace("_", "-"), file, given)


def _defaults(file: ModuleType) -> dict[str, Any]:
    return plugins.keyword_defaults(file.fit) if hasattr(file, "fit") else {}


def decided(request: TuneRequest, plan: MixturePlan) -> TuneRequest:
    """The request with ``class_names`` of its options decided: where they are left open, by whether the names foretell.

    The base must be bare.

    Raises:
        PimergeError: if names are asked for and are no texts.
    """
    session, taken = request.session, request.options.class_names
    if taken is None:
        silently = replace(request, note=lambda message: None, options=replace(request.options, class_names=False))
        taken = may_take_names(session.task, plan) and names_predict(
            session.loaded, session.task, silently.examples()[0]
        )
    if taken:
        count = len(class_names(session.task, session.loaded.processor, session.loaded.config))
        request.note(f"the names of the {count} classes are learned from, as one more example of each")
    return replace(request, options=replace(request.options, class_names=taken))
