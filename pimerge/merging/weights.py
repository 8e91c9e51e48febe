"""Weights per expert and module, by rules such as ``experts/a:*.layers.1?.*=0.7`` and by files."""

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
    """An expert or a checkpoint, which rules refer to by path or name."""

    @property
    def path(self) -> Path:
        """Its folder."""

    @property
    def name(self) -> str:
        """Its name."""


@dataclass(frozen=True)
class Rule:
    """The weight of one expert in the modules whose names match a glob.

    Attributes:
        expert: the expert's path on the command line, or its name.
        modules: glob for the names of modules.
        said: text of the rule, for messages.
    """

    expert: str
    modules: str
    weight: float
    said: str


def parse_rule(text: str) -> Rule:
    """Parse a rule: ``EXPERT=NUMBER`` or ``EXPERT:GLOB=NUMBER``.

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
    """Parse several rules, and report all problems at once."""
    problems = Problems()
    rules = []
    for text in texts:
        with problems.collected():
            rules.append(parse_rule(text))
    problems.raise_any("--weight has several problems")
    return rules


def rules_of(document: Any, path: Path) -> list[Rule]:
    """Parse the rules of a JSON file: expert → weight, or expert → {glob: weight}; the last matching glob applies.

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
    """Return module → one weight per expert, where the last matching rule applies.

    Args:
        modules: the modules of all experts.
        references: the experts' paths on the command line, in the order of ``experts``.
        start: the weights if no rule matches; None if every weight must come from a rule.
    """
    problems = Problems()
    weights = {module: list(start) if start is not None else [math.nan] * len(experts) for module in modules}
    for rule in rules:
        places: list[int] = []
        with problems.collected():
            places = _places(rule, experts, references)
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


def _places(rule: Rule, experts: Sequence[Named], references: Sequence[str]) -> list[int]:
    """The expert that a rule names, by its path or name or by the ending of its path; equal ones are all meant."""
    ways = [(references[i], str(expert.path), expert.name) for i, expert in enumerate(experts)]
    found = [i for i, names in enumerate(ways) if rule.expert in names]
    ending = f"/{rule.expert}"
    found = found or [i for i, expert in enumerate(experts) if str(expert.path.resolve()).endswith(ending)]
    names = sorted({expert.name for expert in experts})
    if not found:
        raise PimergeError(f"'{rule.said}' names an unknown expert '{rule.expert}'", nearest(rule.expert, names))
    meant = list(dict.fromkeys(experts[i].name for i in found))
    if len(meant) > 1:
        raise PimergeError(f"'{rule.expert}' in '{rule.said}' is {' and '.join(meant)}", "name one of them")
    return found


def starting_weights(
    method: OpenedMethod, count: int, given: Sequence[float] | None, has_rules: bool
) -> list[float] | None:
    """Return the weights if no rule matches; None if the method needs weights and they all come from rules."""
    if not has_rules:
        return method.weights(count, given)
    method.weights(count, given or [1 / count] * count)  # a method that takes no weights refuses rules
    if given is not None:
        return list(given)
    try:
        return method.weights(count, None)
    except PimergeError:
        return None


def target_weights(
    experts: Sequence[str], own: str | None, scores: Sequence[float | None], alpha: float | None, *, by_score: bool
) -> list[float] | None:
    """Return α for the target's expert, and (1 − α) divided among the others by softmax of their scores or evenly.

    The result is None if a score is missing.

    Args:
        experts: SHA-256 of each expert.
        own: SHA-256 of the target's expert; None if it is not known.
        alpha: weight of the target's expert; None stands for 1/N.

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
        raise PimergeError(f"--alpha must be from 0 to 1; got {alpha:g}")
    target_weight = (1 / len(experts) if alpha is None else alpha) if has_own else 0.0
    exponentials = [math.exp(score - max(known)) for score in known]
    soft = iter([(1 - target_weight) * value / sum(exponentials) for value in exponentials])
    return [next(soft) if i in others else target_weight for i in range(len(experts))]
