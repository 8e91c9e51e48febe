"""The model card of an output: its README.md, with what the Hub reads at its top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CARD_FILE = "README.md"
UNKNOWN = "not stated"


@dataclass(frozen=True)
class Source:
    """What went in.

    Attributes:
        name: an expert's or a checkpoint's.
        sha256: of its tensors.
        licence: as its own card says; ``not stated`` if it does not.
        weight: what it was weighted with, as text.
        scale: strength of its update before it was merged.
    """

    name: str
    sha256: str
    licence: str
    weight: str
    scale: float = 1.0


def licence_of(folder: Path) -> str:
    """The licence that the card in a folder states.

    >>> licence_of(Path("/no/such/folder"))
    'not stated'
    """
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        metadata: Any = metadata_load(folder / CARD_FILE)
    except (OSError, ValueError, YAMLError):  # no card, no text, or one that nobody can parse
        return UNKNOWN
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    if licence == "other" and metadata.get("license_name"):
        licence = metadata["license_name"]
    return str(licence) if licence else UNKNOWN


def card(
    base: str,
    sources: Sequence[Source],
    method: str,
    summary: str,
    options: Mapping[str, Any],
    truncation: str,
    loading: str,
    *,
    adapter: bool,
    kind: str = "lora",
) -> str:
    """A README.md.

    Args:
        base: the base model's name.
        summary: one line on the method, with its source.
        truncation: what was lost, as a sentence.
        loading: Python that loads the result.
        adapter: whether it is an adapter; else a full model.
        kind: of the adapter.
    """
    from huggingface_hub import ModelCardData

    known = {source.licence for source in sources}
    front = ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "transformers",
        license=known.pop() if len(known) == 1 and UNKNOWN not in known else None,
        tags=["merge", "pimerge", *([kind] if adapter else [])],
    )
    rows = "\n".join(f"| {s.name} | {_strength(s)} | {s.licence} | `{s.sha256}` |" for s in sources)
    chosen = ", ".join(f"{name} {value}" for name, value in options.items()) or "none"
    return f"""---
{front.to_yaml()}
---

# {base.rpartition("/")[2]}, merged by {method}

{"An adapter" if adapter else "A model"} merged from {len(sources)} {"expert" if len(sources) == 1 else "experts"} \
for the base `{base}` by pimerge.

| source | weight | licence | SHA-256 of its tensors |
| --- | --- | --- | --- |
{rows}

- **Method**: `{method}`. {summary}
- **Options**: {chosen}
- **Truncation**: {truncation}

The weights by module are in `coefficients.json` where there are any; every option, version and hash is in \
`pimerge.json`. Whether the result may be used as you mean to depends on the licences of all sources and of the base.

## Loading

```python
{loading.strip()}
```
"""


def _strength(source: Source) -> str:
    return source.weight if source.scale == 1 else f"{source.weight} at scale {source.scale:g}"
