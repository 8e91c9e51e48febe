"""The model card of an output: a README.md whose front matter the Hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CARD_FILE = "README.md"
UNKNOWN = "not stated"
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
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        metadata: Any = metadata_load(folder / CARD_FILE)
    except (OSError, ValueError, YAMLError):  # no card, not UTF-8, or invalid YAML
        return UNKNOWN
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    if licence == "other" and metadata.get("license_name"):
        licence = metadata["license_name"]
    return str(licence) if licence else UNKNOWN


def licences(sources: Sequence[Source]) -> str:
    """Say which licences the sources have, and which of them differ.

    >>> licences([Source("a", "", "mit", "0.5"), Source("b", "", "apache-2.0", "0.5"), Source("c", "", UNKNOWN, "1")])
    'The licences of the sources differ: mit (a), apache-2.0 (b). No licence is stated by c.'
    """
    owners: dict[str, list[str]] = {}
    for source in sources:
        owners.setdefault(source.licence, []).append(source.name)
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
        f"| {s.name} | {s.weight}{'' if s.scale == 1 else f' at scale {s.scale:g}'} | {s.licence} | `{s.sha256}` |"
        for s in sources
    )
    chosen = ", ".join(f"{name} {value}" for name, value in options.items()) or "none"
    return f"""---
{front.to_yaml()}
---

# {base.rpartition("/")[2] or "Adapter"}, merged by {method}

{"An adapter" if kind else "A model"} merged from {len(sources)} {"expert" if len(sources) == 1 else "experts"} \
{f"for the base `{base}` " if base else ""}by pimerge.

| source | weight | licence | SHA-256 of its tensors |
| --- | --- | --- | --- |
{rows}

- **Method**: `{method}`. {summary}
- **Options**: {chosen}
- **Truncation**: {truncation}

The weights by module, if there are any, are in `coefficients.json`; every option, version and hash is in \
`pimerge.json`. {licences(sources)} The licences of all sources and of the base limit how the result may be used.

## Loading

```python
{loading.strip()}
```
"""
