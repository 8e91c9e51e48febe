"""Choose the adapters of a merge and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pimerge.adapters.compatibility import refuse_over_inputs, require_alike
from pimerge.adapters.expert_parts import base_of
from pimerge.adapters.format import PEFT
from pimerge.adapters.selected import open_all, select
from pimerge.adapters.shared_modules import refuse_names, require_shared_modules
from pimerge.adapters.source import open_source
from pimerge.adapters.token_modules import require_same_tokens, rows_have, token_axis
from pimerge.checkpoints.base import find_base
from pimerge.core.errors import PimergeError, Problems
from pimerge.merging.method import METHODS, OpenedMethod
from pimerge.merging.request import HeadPolicy, MergeRequest
from pimerge.merging.weights import Rule, by_module, parse_rules, rules_of, starting_weights, target_weights

if TYPE_CHECKING:
    from pimerge.adapters.expert import Expert


@dataclass(frozen=True)
class ChosenExperts:
    """Compatible experts, their weights by module, and the target's own expert if it is known.

    Attributes:
        vocabulary: how vocabularies of several sizes are merged; empty if none of their modules is updated.
    """

    experts: list[Expert]
    weights: dict[str, list[float]]
    target: Expert | None
    vocabulary: str = ""

    def refuse_over(self, output: Path | None) -> None:
        """Refuse an output that would overwrite an expert, or a folder that contains one."""
        if output is not None:
            refuse_over_inputs(output, [*self.experts, *([self.target] if self.target else [])])

    @property
    def names(self) -> list[str]:
        """The modules or tensor sets of all experts, in alphabetical order."""
        return sorted({name for expert in self.experts for name in expert.parts})


def choose(request: MergeRequest, method: OpenedMethod) -> ChosenExperts:
    """Choose experts and weights by the request, the ranking, or a file of coefficients."""
    rules = parse_rules(request.rules)
    request = _with_base(request)
    if request.expert_order is not None or request.config is not None:
        request = replace(request, experts=_opened(request))
    if request.coefficients is not None:
        if request.weights is not None or request.alpha is not None or rules:
            raise PimergeError(
                "--coefficients excludes --weights, --weight and --alpha", "the file already contains the weights"
            )
        from pimerge.core.files import read_json

        document = read_json(request.coefficients)
        if isinstance(document, dict) and "experts_trained" in document:
            return _alike(request, _from_coefficients(request, request.coefficients))
        rules = rules_of(document, request.coefficients)
    return _alike(request, _from_request(request, method, rules))


def _with_base(request: MergeRequest) -> MergeRequest:
    """Take the folder of ``--into`` as the base of experts that name one base, if that is not on this machine."""
    if request.base is not None or request.into is None or not request.experts:
        return request
    given = find_base(str(request.into), None, Path.cwd())
    if given.folder is None:
        return request
    own = set()
    try:
        for reference in request.experts:
            if not isinstance(reference, str | Path):
                return request
            source = open_source(reference, request.config)
            own.add(base_of(source.path, source.config, None))
    except PimergeError:  # is reported with all others when the experts are opened
        return request
    if len({base.name for base in own}) > 1 or any(base.folder is not None for base in own):
        return request
    request.note(f"{own.pop().label} is not on this machine: '{request.into}' is taken as the base")
    return replace(request, base=str(request.into))


def _opened(request: MergeRequest) -> list[Expert]:
    """Open the given experts with the options that say how their files are read."""
    if request.experts is None:
        option = "--config" if request.expert_order is None else "--expert-order"
        raise PimergeError(f"{option} is for experts that are named, not for a ranking", "name the experts")
    return open_all(
        request.experts,
        request.base,
        convert=request.converts,
        expert_order=request.expert_order,
        config=request.config,
    )


def _alike(request: MergeRequest, chosen: ChosenExperts) -> ChosenExperts:
    """Check that the experts, and the target whose head is used, are compatible; only PEFT's format has heads."""
    if any(expert.format != PEFT for expert in chosen.experts) and chosen.target not in chosen.experts:
        chosen = replace(chosen, target=None)
    chosen = _in_one_form(chosen)
    target = chosen.target if request.head is HeadPolicy.TARGET else None
    require_alike([*chosen.experts, *([target] if target else [])], any_vocabulary=True)
    if not request.allow_disjoint:
        require_shared_modules(chosen.experts)
    return replace(chosen, vocabulary=_same_tokens(request, chosen.experts))


def _same_tokens(request: MergeRequest, experts: Sequence[Expert]) -> str:
    """Check that the updates of embeddings and output layers are of the same tokens; how, if vocabularies differ."""
    updated = {
        name: module
        for expert in experts
        for name, module in expert.modules.items()
        if request.selects(name) and token_axis(module) is not None
    }
    holders = {
        expert.name: (expert, range(rows))
        for module in updated.values()
        for expert in experts
        if (rows := rows_have(expert, module)) is not None
    }
    return require_same_tokens([*holders.values()])


def _in_one_form(chosen: ChosenExperts) -> ChosenExperts:
    """Give experts of one kind tensors of one form, where the kind says how."""
    first, *others = chosen.experts
    form = None if first.unhandled else first.strategy.in_one_form
    if form is None or any(other.kind != first.kind for other in others):
        return chosen
    if any(other.parts != first.parts for other in others):
        problems = Problems()
        refuse_names(chosen.experts, problems)
        problems.raise_any("these experts do not fit each other")
        if not set(first.parts).intersection(*(other.parts for other in others)):
            return chosen
    sets, fields = form([expert.tensor_sets for expert in chosen.experts])
    experts = [
        replace(expert, tensor_sets=dict(own), config={**expert.config, **fields})
        for expert, own in zip(chosen.experts, sets, strict=True)
    ]
    target = next((each for each in experts if chosen.target and each.path == chosen.target.path), chosen.target)
    return replace(chosen, experts=experts, target=target)


def _from_coefficients(request: MergeRequest, path: Path) -> ChosenExperts:
    from pimerge.adapters.writer import Coefficients
    from pimerge.core.documents import parse_document

    document: Coefficients = parse_document(Coefficients, path, "expected the coefficients.json of a tuned expert")
    experts = open_all(
        request.experts or [str(path.parent / expert) for expert in document.experts],
        request.base,
        convert=request.converts,
    )
    if [expert.sha256 for expert in experts] != document.sha256:
        raise PimergeError(
            f"the experts differ from those of '{path}', or have changed since it was written",
            "expected in this order: " + ", ".join(document.experts),
        )
    experts = _at_strengths(experts, document.scales)
    if document.experts_trained:
        request.note("the experts were trained together with these weights, so the merge differs from the tuned expert")
    own = select(None, request.ranking, request.target, request.base, needed=False).target
    return ChosenExperts(experts, document.weights, own)


def _at_strengths(experts: list[Expert], strengths: list[float]) -> list[Expert]:
    problems = Problems()
    for expert, strength in zip(experts, strengths, strict=True):
        if strength != 1 and any(module.conversions for module in expert.modules.values()):
            problems.add(
                f"'{expert.name}' is converted with the weights of the base, so its scale must be 1; got {strength:g}",
                "set its scale to 1 and multiply its weights instead",
            )
    problems.raise_any("some experts cannot be scaled")
    return [expert.with_strength(strength) for expert, strength in zip(experts, strengths, strict=True)]


def _from_request(request: MergeRequest, method: OpenedMethod, rules: Sequence[Rule]) -> ChosenExperts:
    convert = request.converts
    chosen = select(request.experts, request.ranking, request.target, request.base, convert=convert)
    experts, own, scores = chosen.experts, chosen.target, chosen.scores
    if not experts:
        raise PimergeError(
            f"'{request.ranking_path}' expects no expert to help",
            "run 'pimerge tune', which trains a fresh expert, name experts to merge anyway, or rank again with "
            "'pimerge rank --no-gate'",
        )
    refuse_weights(request, method)
    if method.strategy.joins_target and not request.experts and own is not None:
        others = [i for i, expert in enumerate(experts) if expert.sha256 != own.sha256]
        experts, scores = [own, *(experts[i] for i in others)], [None, *(scores[i] for i in others)]
    references = [
        str(reference if isinstance(reference, str | Path) else reference.path)
        for reference in request.experts or experts
    ]
    given = request.weights
    if given is None:
        hashes = [expert.sha256 for expert in experts]
        given = weights_by_score(request, method, hashes, own.sha256 if own else None, scores)
    require_one_each(given, [expert.name for expert in experts])
    start = starting_weights(method, len(experts), given, bool(rules))
    names = sorted({name for expert in experts for name in expert.parts})
    weights = by_module(names, experts, references, start, rules)
    for row in sorted({tuple(row) for row in weights.values()}) if rules else ():
        method.weights(len(experts), list(row))
    alone = experts[0] if len(experts) == 1 else None  # a single expert is its own target
    return ChosenExperts(experts, weights, own or alone)


def refuse_weights(request: MergeRequest, method: OpenedMethod) -> None:
    """Refuse ``alpha`` together with ``weights``, and for methods that do not add the target's own expert."""
    if request.alpha is not None and not method.strategy.joins_target:
        takers = " and ".join(f"'{other.name}'" for other in METHODS if other.joins_target)
        raise PimergeError(f"--alpha applies to {takers}, not to '{method.name}'", "leave it out")
    if request.weights is not None and request.alpha is not None:
        raise PimergeError(
            "--weights and --alpha exclude each other", "the weights already include the weight of the target"
        )


def weights_by_score(
    request: MergeRequest,
    method: OpenedMethod,
    hashes: Sequence[str],
    own: str | None,
    scores: Sequence[float | None],
) -> list[float] | None:
    """Return weights if none are given: α for the target's expert, the rest by the ranking's scores or evenly.

    Args:
        hashes: SHA-256 of each expert.
        own: SHA-256 of the target's expert.
    """
    by_score = method.strategy.weights_by_score
    if not method.strategy.joins_target or not (by_score or request.alpha is not None):
        return None
    return target_weights(hashes, own, scores, request.alpha, by_score=by_score)


def require_one_each(given: Sequence[float] | None, names: Sequence[str]) -> None:
    """Check that there is one weight for each expert."""
    if given is not None and len(given) != len(names):
        raise PimergeError(
            f"--weights has {len(given)} numbers for {len(names)} experts ({', '.join(names)})",
            "give one for each, in order",
        )
