"""Which experts ``pimerge merge`` takes, and with which weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pimerge.adapters.selected import open_all, select
from pimerge.cli.console import note
from pimerge.cli.inputs import parse_numbers
from pimerge.cli.merge.request import Request
from pimerge.core.errors import PimergeError, Problems
from pimerge.merging.weights import shares, starting_weights

if TYPE_CHECKING:
    from pimerge.adapters.expert import Expert


@dataclass(frozen=True)
class Chosen:
    """Experts, their weights module by module, and the target's own expert, if it is known."""

    experts: list[Expert]
    weights: dict[str, list[float]]
    target: Expert | None


def choose(request: Request) -> Chosen:
    """The experts and their weights, from the options, the ranking and files of coefficients.

    Raises:
        PimergeError: if they do not fit each other.
    """
    from pimerge.adapters.compatibility import require_alike
    from pimerge.merging.weights import by_module, parse_rules, rules_of

    rules = parse_rules(request.rules)
    if request.coefficients is not None:
        if request.weights is not None or request.alpha is not None or rules:
            raise PimergeError(
                "--coefficients excludes --weights, --weight and --alpha", "it holds the weights already"
            )
        from pimerge.core.files import read_json

        document = read_json(request.coefficients)
        if isinstance(document, dict) and "experts_trained" in document:
            return _from_coefficients(request)
        rules = rules_of(document, request.coefficients)
    experts, references, given, target = _from_options(request)
    method = request.open_method()
    start = starting_weights(method, len(experts), given, bool(rules))
    require_alike(experts)
    names = sorted({name for expert in experts for name in expert.parts})
    weights = by_module(names, experts, references, start, rules)
    for row in sorted({tuple(row) for row in weights.values()}) if rules else ():
        method.weights(len(experts), list(row))
    alone = experts[0] if len(experts) == 1 else None  # a single one is its own target
    return Chosen(experts, weights, target or alone)


def _from_coefficients(request: Request) -> Chosen:
    from pimerge.adapters.writer import Coefficients
    from pimerge.core.documents import parse_document

    path = request.coefficients
    assert path is not None
    document: Coefficients = parse_document(Coefficients, path, "expected the coefficients.json of a tuned expert")
    experts = open_all(
        request.experts or [str(path.parent / expert) for expert in document.experts],
        request.base,
        convert=request.base is not None,
    )
    if [expert.sha256 for expert in experts] != document.sha256:
        raise PimergeError(
            f"the experts are not those of '{path}', or have changed since",
            "expected in this order: " + ", ".join(document.experts),
        )
    experts = _scaled(experts, document.scales)
    if document.experts_trained:
        note(
            "the experts were trained together with these weights, so the merge differs from what was tuned",
            request.quiet,
        )
    own = select(None, request.ranking, request.target, request.base, needed=False).target
    return Chosen(experts, document.weights, own)


def _scaled(experts: list[Expert], scales: list[float]) -> list[Expert]:
    """The experts at their scales."""
    problems = Problems()
    for expert, scale in zip(experts, scales, strict=True):
        if scale != 1 and any(module.conversions for module in expert.modules.values()):
            problems.add(
                f"'{expert.name}' is converted with the base's weights, and its scale is {scale:g}",
                "only plain LoRA is scaled: set its scale to 1 and multiply its weights instead",
            )
    problems.raise_any("some experts cannot be scaled")
    return [expert.with_strength(scale) for expert, scale in zip(experts, scales, strict=True)]


def _from_options(request: Request) -> tuple[list[Expert], list[str], list[float] | None, Expert | None]:
    """Experts, what they were called, the weights that are given, and the target's expert."""
    chosen = select(request.experts, request.ranking, request.target, request.base, convert=request.base is not None)
    experts, own, scores = chosen.experts, chosen.target, chosen.scores
    if not experts:
        raise PimergeError(
            f"'{request.ranking}' expects no expert to help",
            "run 'pimerge tune', which trains a fresh expert, name experts to merge all the same, or rank again with "
            "'pimerge rank --no-gate'",
        )
    references = request.experts or [str(expert.path) for expert in experts]
    given = parse_numbers(request.weights, "--weights") if request.weights is not None else None
    joins_target = request.open_method().strategy.joins_target
    if request.alpha is not None and not joins_target:
        raise PimergeError(
            f"--alpha is the target's share in 'interpolated' and 'fisher', not in '{request.method}'", "leave it out"
        )
    if given is not None and request.alpha is not None:
        raise PimergeError("--weights and --alpha exclude each other", "the weights hold the target's share already")
    if joins_target:
        others = [i for i, expert in enumerate(experts) if own is None or expert.sha256 != own.sha256]
        if not request.experts and own is not None:
            experts = [own, *(experts[i] for i in others)]
            references = [str(expert.path) for expert in experts]
            scores = [None, *(scores[i] for i in others)]
        if given is None and (request.method == "interpolated" or request.alpha is not None):
            sha256 = [expert.sha256 for expert in experts]
            by_score = request.method == "interpolated"
            given = shares(sha256, own.sha256 if own else None, scores, request.alpha, by_score=by_score)
    if given is not None and len(given) != len(experts):
        names = ", ".join(expert.name for expert in experts)
        raise PimergeError(
            f"--weights holds {len(given)} numbers for {len(experts)} experts ({names})", "give one for each, in order"
        )
    return experts, list(references), given, own
