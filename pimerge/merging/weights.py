"""Weights per expert and module: rules such as ``experts/a:*.layers.1?.*=0.7``, and files of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pimerge.core.errors import PimergeError, Problems, nearest

if TYPE_CHECKING:
    from pimerge.merging.method import OpenedMethod

EVERYWHERE = "*"


class Named(Protocol):
    """An expert or a checkpoint, as far as rules know it."""

    @property
    def path(self) -> Path:
        """Its folder."""

    @property
    def name(self) -> str:
        """Its name."""


@dataclass(frozen=True)
class Rule:
    """The weight of one expert in the modules whose name matches a glob.

    Attributes:
        expert: as it was given on the command line, or its name.
        modules: a glob over the modules' names.
        said: the rule as it was written, for messages.
    """

    expert: str
    modules: str
    weight: float
    said: str


def parse_rule(text: str) -> Rule:
    """A rule of ``--weight``: ``EXPERT=NUMBER`` or ``EXPERT:GLOB=NUMBER``.

    >>> parse_rule("experts/a:*.layers.1?.*=0.7")
    Rule(expert='experts/a', modules='*.layers.1?.*', weight=0.7, said='experts/a:*.layers.1?.*=0.7')
    """
    left, equals, number = text.rpartition("=")
    expert, _, glob = left.partition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (equals and expert and math.isfinite(weight)) or (":" in left and not glob):
        raise PimergeError(
            f"--weight is '{text}'",
            "expected EXPERT=NUMBER or EXPERT:GLOB=NUMBER, such as 'experts/a:*.layers.1?.*=0.7'",
        )
    return Rule(expert, glob or EVERYWHERE, weight, text)


def parse_rules(texts: Sequence[str]) -> list[Rule]:
    """Several rules, with the problems of all of them at once."""
    problems = Problems()
    rules = []
    for text in texts:
        with problems.collected():
            rules.append(parse_rule(text))
    problems.raise_any("--weight has several problems")
    return rules


def rules_of(document: Any, path: Path) -> list[Rule]:
    """The rules of a JSON file: expert → weight, or expert → {glob: weight}; a later glob goes before an earlier.

    >>> [rule.said for rule in rules_of({"a": 0.5, "b": {"*": 0.1, "*.q_proj": 0.9}}, Path("w.json"))]
    ['a:*=0.5', 'b:*=0.1', 'b:*.q_proj=0.9']
    """
    problems = Problems()
    rules = []
    for expert, given in document.items() if isinstance(document, dict) else [("", None)]:
        for glob, weight in (given if isinstance(given, dict) else {EVERYWHERE: given}).items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                problems.add(
                    f"'{path}': the weight of '{expert}' in '{glob}' is {weight!r}",
                    'expected {"EXPERT": NUMBER} or {"EXPERT": {"GLOB": NUMBER}}, or the coefficients.json of a merge',
                )
            else:
                rules.append(Rule(expert, glob, float(weight), f"{expert}:{glob}={weight}"))
    problems.raise_any(f"'{path}' holds values that are not weights")
    return rules


def by_module(
    modules: Sequence[str],
    experts: Sequence[Named],
    references: Sequence[str],
    start: Sequence[float] | None,
    rules: Sequence[Rule],
) -> dict[str, list[float]]:
    """Module → one weight per expert; the last rule that matches decides.

    Args:
        modules: every module of the experts.
        references: the experts as they were given, in the order of ``experts``.
        start: the weights where no rule matches; None if every weight must come from a rule.
    """
    problems = Problems()
    weights = {module: list(start) if start is not None else [math.nan] * len(experts) for module in modules}
    for rule in rules:
        places = [
            i for i, expert in enumerate(experts) if rule.expert in (references[i], str(expert.path), expert.name)
        ]
        if not places:
            names = [expert.name for expert in experts]
            problems.add(f"'{rule.said}' names the expert '{rule.expert}'", nearest(rule.expert, names))
        matched = [module for module in modules if fnmatchcase(module, rule.modules)]
        if not matched:
            problems.add(
                f"'{rule.said}': no module matches '{rule.modules}'", f"the modules are named like '{modules[0]}'"
            )
        for module in matched:
            for place in places:
                weights[module][place] = rule.weight
    for place, expert in enumerate(() if problems.found else experts):
        missing = [module for module in modules if math.isnan(weights[module][place])]
        if missing:
            problems.add(
                f"'{expert.name}' has no weight in {len(missing)} of {len(modules)} modules, such as '{missing[0]}'",
                f"add --weight '{expert.name}=NUMBER' before the other rules, or pass --weights",
            )
    problems.raise_any("the weights do not match the experts")
    return weights


def starting_weights(
    method: OpenedMethod, count: int, given: Sequence[float] | None, has_rules: bool
) -> list[float] | None:
    """The weights where no rule decides; None for a method that needs weights, if all come from rules."""
    if not has_rules:
        return method.weights(count, given)
    method.weights(count, given or [1 / count] * count)  # refused by a method that takes none
    if given is not None:
        return list(given)
    try:
        return method.weights(count, None)
    except PimergeError:
        return None


def target_weights(
    experts: Sequence[str], own: str | None, scores: Sequence[float | None], alpha: float | None, *, by_score: bool
) -> list[float] | None:
    """α for the target's expert, and (1 − α) for the others by the softmax of their scores or evenly.

    None where a score is missing.

    Args:
        experts: the SHA-256 of each.
        own: that of the target's expert; None if it is not known.
        alpha: None for 1/N.

    >>> target_weights(["x", "a", "b"], "x", [None, 0.3, 0.3], 0.5, by_score=True)
    [0.5, 0.25, 0.25]
    """
    others = [i for i, sha256 in enumerate(experts) if sha256 != own]
    known = [score for i in others if (score := scores[i] if by_score else 0.0) is not None]
    if len(known) < len(others):
        return None
    has_own = len(others) < len(experts)
    if alpha is not None and not has_own:
        raise PimergeError("--alpha is the weight of the target's expert, which is not among the experts")
    if alpha is not None and not 0 <= alpha <= 1:
        raise PimergeError(f"--alpha is {alpha}", "expected a number from 0 to 1")
    target_weight = (1 / len(experts) if alpha is None else alpha) if has_own else 0.0
    exponentials = [math.exp(score - max(known)) for score in known]
    soft = iter([(1 - target_weight) * value / sum(exponentials) for value in exponentials])
    return [next(soft) if i in others else target_weight for i in range(len(experts))]
