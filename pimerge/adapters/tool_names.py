"""Name the modules of files alike that several tools wrote for one model, where their names map by a rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pimerge.adapters.expert import Expert
from pimerge.adapters.format import FORMATS, Format
from pimerge.core.errors import Problems


def with_one_naming(experts: Sequence[Expert]) -> list[Expert]:
    """Give the modules of all experts the names of the first expert's file, in whose format a merge is written.

    Names are matched where both are flattened alike. A module that the first file lacks gets a name by the same rule;
    without such a rule the experts are refused. Experts with the same names, and those of PEFT, are left as they are.
    """
    formats = [FORMATS.load(expert.format) for expert in experts]
    rules = [format_.flat for format_ in formats]
    flattened = [
        {name: rule(name) for name in expert.modules}
        for expert, rule in zip(experts, rules, strict=True)
        if rule is not None
    ]
    if len(flattened) < len(experts) or len(experts) < 2 or _is_one(formats, flattened):
        return list(experts)
    _require_matching(experts, flattened)
    problems = Problems()
    first, target = experts[0], formats[0]
    others = {each for names in flattened for each in names.values()}
    known = {each: name for name, each in flattened[0].items()}
    found = [first]
    for expert, format_, names in zip(experts[1:], formats[1:], flattened[1:], strict=True):
        new = {}
        for name, each in names.items():
            new[name] = known.get(each) or target.named(each, first.modules, others)
            if not new[name] or (format_ is not target and (why := _why_not_written(expert, name, target))):
                problems.add(
                    f"module '{name}' of '{expert.name}' "
                    + (why if new[name] else f"has no name by a rule in the format of {target.name}"),
                    f"name '{expert.name}' first, so that its format is written",
                )
        if not problems.found:
            found.append(_renamed(expert, new, target))
    problems.raise_any(f"these files cannot be merged in the format of {target.name}, that of '{first.name}'")
    return found


def _is_one(formats: Sequence[Format], flattened: Sequence[Mapping[str, str]]) -> bool:
    """Whether the names are those of one naming already: each module that several experts share has one name."""
    if len({format_.naming for format_ in formats}) > 1:
        return False
    if any(len(set(names.values())) < len(names) for names in flattened):
        return True
    pairs = {pair for names in flattened for pair in names.items()}
    return len({each for _, each in pairs}) == len({name for name, _ in pairs})


def _require_matching(experts: Sequence[Expert], flattened: Sequence[Mapping[str, str]]) -> None:
    """Refuse files with two names for one module, and those that name one part of a model differently."""
    problems = Problems()
    for expert, names in zip(experts, flattened, strict=True):
        count = Counter(names.values())
        if twice := sorted(name for name, each in names.items() if count[each] > 1):
            problems.add(
                f"'{expert.name}' names one module in two ways: {' and '.join(twice[:2])}", "leave one out of the file"
            )
    for expert, names in zip(experts[1:], flattened[1:], strict=True):
        for part in sorted({_part(each) for each in names.values()}):
            own, other = ({each: n for n, each in e.items() if _part(each) == part} for e in (names, flattened[0]))
            if other and not own.keys() & other.keys():
                problems.add(
                    f"'{expert.name}' has the format of {expert.format}, '{experts[0].name}' that of "
                    f"{experts[0].format}, and these name modules differently, such as '{min(own.values())}' and "
                    f"'{min(other.values())}', and no rule maps the names",
                    "merge files of one format; the tools that wrote them convert between formats",
                )
    problems.raise_any("the modules of these files cannot be matched")


def _part(name: str) -> str:
    """The part of a pipeline that a flattened name belongs to: one of the text encoders, or the model itself."""
    return name.partition("_text")[0][:8] if name.startswith("lora_te") else ""


def _why_not_written(expert: Expert, name: str, target: Format) -> str:
    """Why a format cannot hold an update of another format; empty if it can."""
    place = expert.places[name]
    if not target.holds_products and (place.product or place.whole or place.bias):
        return f"is not a plain LoRA, and the format of {target.name} has no other updates"
    return ""


def _renamed(expert: Expert, names: Mapping[str, str], target: Format) -> Expert:
    """An expert under other names of its modules, as one of another format."""
    assert target.ending is not None
    modules = {names[name]: replace(module, name=names[name]) for name, module in expert.modules.items()}
    places = {
        names[name]: replace(place, stem=names[name], ending=target.ending, rows=())
        if expert.format != target.name
        else replace(place, stem=names[name])
        for name, place in expert.places.items()
    }
    renamed = {old: names.get(new, new) for old, new in expert.renamed.items()}
    renamed |= {old: new for old, new in names.items() if old != new and old not in expert.renamed.values()}
    return replace(expert, modules=dict(sorted(modules.items())), places=places, format=target.name, renamed=renamed)
