"""The model card of an output: a README.md whose front matter the Hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pimerge.core.shown import code, markdown

CARD_FILE = "README.md"
UNKNOWN = "not stated"
_LONGEST = 2**16  # letters of a card that are read
_ALIASES = 10  # in its YAML; each can double what it stands for
_LIBRARIES = ("peft", "diffusers", "mlx")  # that load adapters, as the Hub names them


@dataclass(frozen=True)
class Source:
    """An expert or checkpoint that was merged.

    Attributes:
        sha256: hash of its tensors.
        licence: the licence on its own card; ``not stated`` without one.
        weight: its weight in the merge, as text.
        scale: strength of its update before it was merged.
    """

    name: str
    sha256: str
    licence: str
    weight: str
    scale: float = 1.0


def licence_of(folder: Path) -> str:
    """Read the licence from the card in a folder.

    >>> licence_of(Path("/no/such/folder"))
    'not stated'
    """
    metadata = _front_matter(folder / CARD_FILE)
    licence = metadata.get("license")
    if licence == "other" and metadata.get("license_name"):
        licence = metadata["license_name"]
    found = licence if isinstance(licence, list) else [licence]
    return ", ".join(str(each) for each in found[:9] if isinstance(each, str | int | float))[:200] or UNKNOWN


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML that a card begins with; empty if it cannot be read, or if its aliases could fill the memory."""
    from yaml import AliasEvent, SafeLoader, YAMLError, load, parse

    try:
        if not path.is_file():
            return {}
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_LONGEST)
        if not (front := _between_dashes(text)):
            return {}
        if sum(isinstance(event, AliasEvent) for event in parse(front, SafeLoader)) > _ALIASES:
            return {}
        found = load(front, SafeLoader)
    except (OSError, ValueError, YAMLError, RecursionError):  # no card, not UTF-8, or invalid YAML
        return {}
    return found if isinstance(found, dict) else {}


def _between_dashes(text: str) -> str:
    """The lines of a card's front matter; of one that is longer than what was read, those of its whole fields."""
    first, *lines = text.lstrip().split("\n")
    if first.rstrip() != "---":
        return ""
    end = next((place for place, line in enumerate(lines) if line.rstrip() == "---"), None)
    if end is None and len(text) < _LONGEST:
        return ""
    if end is None:
        end = max((place for place, line in enumerate(lines) if line[:1].isalpha()), default=0)
    return "\n".join(lines[:end])


def licences(sources: Sequence[Source]) -> str:
    """Say which licences the sources have, and which of them differ.

    >>> licences([Source("a", "", "mit", "0.5"), Source("b", "", "apache-2.0", "0.5"), Source("c", "", UNKNOWN, "1")])
    'The licences of the sources differ: mit (a), apache-2.0 (b). No licence is stated by c.'
    """
    owners: dict[str, list[str]] = {}
    for source in sources:
        owners.setdefault(markdown(source.licence), []).append(markdown(source.name))
    unknown = owners.pop(UNKNOWN, [])
    sentences = []
    if len(owners) == 1:
        sentences.append(f"{'The other' if unknown else 'All'} sources are licensed as {next(iter(owners))}.")
    elif owners:
        listed = ", ".join(f"{licence} ({', '.join(names)})" for licence, names in owners.items())
        sentences.append(f"The licences of the sources differ: {listed}.")
    if unknown:
        sentences.append(f"No licence is stated by {', '.join(unknown)}.")
    return " ".join(sentences[::-1] if len(owners) == 1 else sentences)


def card(
    base: str,
    sources: Sequence[Source],
    method: str,
    summary: str,
    options: Mapping[str, Any],
    truncation: str,
    loading: str,
    kind: str | None = "lora",
) -> str:
    """Compose a README.md.

    Args:
        base: name of the base model; empty if it is unknown.
        summary: one line on the method, with its source.
        truncation: the truncation error, as a sentence.
        loading: Python code that loads the result.
        kind: kind of an adapter; None for a full model.
    """
    from huggingface_hub import ModelCardData

    known = {source.licence for source in sources}
    front = ModelCardData(
        base_model=base or None,
        library_name=next((name for name in _LIBRARIES if name in loading), None) if kind else "transformers",
        license=known.pop() if len(known) == 1 and UNKNOWN not in known else None,
        tags=["merge", "pimerge", *([kind] if kind else [])],
    )
    rows = "\n".join(
        f"| {markdown(s.name)} | {markdown(s.weight)}{'' if s.scale == 1 else f' at scale {s.scale:g}'} "
        f"| {markdown(s.licence)} | `{s.sha256}` |"
        for s in sources
    )
    chosen = ", ".join(markdown(f"{name} {value}") for name, value in options.items()) or "none"
    return f"""---
{front.to_yaml()}
---

# {markdown(base.rpartition("/")[2]) or "Adapter"}, merged by {method}

{"An adapter" if kind else "A model"} merged from {len(sources)} {"expert" if len(sources) == 1 else "experts"} \
{f"for the base {code(base)} " if base else ""}by pimerge.

| source | weight | licence | SHA-256 of its tensors |
| --- | --- | --- | --- |
{rows}

- **Method**: {code(method)}. {summary}
- **Options**: {chosen}
- **Truncation**: {truncation}

The weights by module, if there are any, are in `coefficients.json`; every option, version and hash is in \
`pimerge.json`. {licences(sources)} The licences of all sources and of the base limit how the result may be used.

## Loading

```python
{loading.strip()}
```
"""
