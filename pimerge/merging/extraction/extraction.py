"""The result of ``pimerge.extract``, and the documents that are written with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pimerge.adapters.head import Head
from pimerge.adapters.merged_module import Summary, relative_error
from pimerge.adapters.model_card import UNKNOWN, licence_of
from pimerge.adapters.model_class import loading_code
from pimerge.adapters.writer import base_reference
from pimerge.checkpoints.base import Base
from pimerge.checkpoints.checkpoint import Checkpoint
from pimerge.core.manifest import Manifest, inputs_of, library_versions, request_hash
from pimerge.core.shown import code, markdown
from pimerge.merging.extraction.changes import Changes, LeftOut
from pimerge.merging.request import ResultRequest


@dataclass(frozen=True)
class Extraction:
    """A LoRA that was extracted from a fine-tuned checkpoint; see :func:`pimerge.extract`.

    Attributes:
        path: its folder.
        finetuned, base: names of the two checkpoints.
        modules: rank and error of each module, in order.
        sizes: module → ‖ΔW‖ / ‖W0‖; None if W0 is zero.
        left_out: what changed but is not in the result.
        head: parameters that are saved whole.
    """

    path: Path
    finetuned: str
    base: str
    modules: list[Summary]
    sizes: dict[str, float | None]
    left_out: list[LeftOut]
    head: list[str]

    @property
    def error(self) -> float:
        """‖ΔW − B A‖ / ‖ΔW‖ over all modules."""
        return relative_error(self.modules)

    @property
    def error_of_all(self) -> float:
        """The same over everything that changed, where what is left out counts as lost."""
        left = sum(each.energy for each in self.left_out)
        energy = sum(each.energy for each in self.modules) + left
        lost = sum(each.lost for each in self.modules) + left
        return float((lost / energy) ** 0.5) if energy else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "output": str(self.path),
            "finetuned": self.finetuned,
            "base": self.base,
            "error": self.error,
            "error_of_all": self.error_of_all,
            "modules": [
                {"name": s.name, "rank": s.rank, "error": s.error, "size": self.sizes[s.name]} for s in self.modules
            ],
            "left_out": [asdict(each) for each in self.left_out],
            "head": self.head,
        }


def extraction_hash(request: ResultRequest, finetuned: Checkpoint, base: Checkpoint, seed: int) -> str:
    """The hash of all that decides the result."""
    return request_hash(
        command="extract",
        checkpoints=[finetuned.name, finetuned.sha256, base.name, base.sha256],
        options=[str(request.rank), request.energy, request.include, request.exclude, request.dtype, seed],
    )


def manifest_of(
    request: ResultRequest, finetuned: Checkpoint, base: Checkpoint, seed: int, result: Extraction
) -> Manifest:
    """The content of ``pimerge.json``, without the hashes of the output files."""
    return Manifest(
        command="extract",
        options={
            "base": base.name,
            "base_sha256": base.sha256,
            "rank": str(request.rank),
            "energy": request.truncation().energy,
            "include": list(request.include),
            "exclude": list(request.exclude),
            "dtype": request.dtype,
            "seed": seed,
        },
        device="cpu",
        versions=library_versions(),
        inputs=inputs_of([finetuned]),
        outputs={},
        results={
            "truncation": result.error,
            "truncation_of_all": result.error_of_all,
            "modules": {s.name: {"rank": s.rank, "truncation": s.error} for s in result.modules},
            "left_out": {each.name: {"why": each.why, "size": each.size} for each in result.left_out},
        },
        request=extraction_hash(request, finetuned, base, seed),
    )


def card_of(result: Extraction, finetuned: Checkpoint, base: Base, changes: Changes, head: Head) -> str:
    """The content of ``README.md``."""
    from huggingface_hub import ModelCardData

    reference, _ = base_reference(base, result.path)
    licence = licence_of(finetuned.path)
    front = ModelCardData(
        base_model=reference,
        library_name="peft",
        license=None if licence == UNKNOWN else licence,
        tags=["lora", "pimerge"],
    )
    ranks = "/".join(map(str, sorted({s.rank for s in result.modules})))
    parts = [f"- **Error**: {result.error:.2%} of ‖ΔW‖ in {len(result.modules)} modules, at rank {ranks}."]
    if result.left_out:
        names = listed_names([each.name for each in result.left_out])
        parts.append(
            f"- **Left out**, although it changed: {markdown(names)}. With it, the error is {result.error_of_all:.2%}."
        )
    if result.head:
        parts.append(f"- **Saved whole**: {markdown(', '.join(result.head))}.")
    details = "\n".join(parts)
    return f"""---
{front.to_yaml()}
---

# {markdown(finetuned.name)}, as a LoRA

An adapter extracted from the full checkpoint {code(finetuned.name)} \
(licence: {markdown(licence)}; SHA-256 `{finetuned.sha256}`)
relative to the base {code(reference)} by pimerge: the best approximation of W − W0 by B A in every module.

{details}

Every option, version and hash, and the error of each module, is in `pimerge.json`. The licences of the checkpoint and
of the base limit how the result may be used.

## Loading

```python
{loading_code(changes.fields, base, reference, head).strip()}
```
"""


def listed_names(names: Sequence[str], count: int = 5) -> str:
    """The first names of a list, and how many more there are.

    >>> listed_names(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
