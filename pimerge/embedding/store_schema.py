"""The document ``embeddings.json``: an entry for each expert, and measured gains of the experts for each other."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pimerge.core.documents import parse_document
from pimerge.core.errors import PimergeError
from pimerge.core.files import read_json, require_no_device
from pimerge.core.plain_names import is_inside

SCHEMA = 4


class EmbedSettings(BaseModel):
    """Settings of an embedding; with other settings the embedding is computed again."""

    model_config = ConfigDict(extra="forbid")

    labels: str = "true"
    max_examples: int = 1000
    shots: int | None = None
    seed: int = 0
    dtype: str = "float32"


class Sidecar(BaseModel):
    """A file beside the document: its path relative to the document's folder, and its SHA-256."""

    model_config = ConfigDict(extra="forbid")

    file: str
    sha256: str


class Embedding(BaseModel):
    """One expert's entry.

    Attributes:
        path: the expert's folder, relative to the store's folder.
        sha256: hash of the adapter's tensors; ``config_sha256`` of its config, ``task_sha256`` of its task and data.
        base: the base model's identity.
        examples, tokens: number of examples and tokens in the estimate.
        route: ``rules`` or ``loop``, see :class:`pimerge.embedding.fisher.Fisher`.
        norm: ‖F‖₂ over all parameters; ``trace`` is ΣF, ``largest`` the largest entry.
        sketches: random projections of ``gradients`` and ``update``, the two parts of the measure ``fisher``; see
            :mod:`pimerge.embedding.random_projection`.
        sidecars: ``diagonal``, ``marginals`` and optionally ``grams``.
    """

    model_config = ConfigDict(extra="forbid")

    path: str
    sha256: str
    config_sha256: str
    task_sha256: str
    kind: str
    base: str
    task: dict[str, Any]
    estimator: str = "diagonal empirical Fisher, squared per example"
    settings: EmbedSettings
    examples: int
    tokens: int
    device: str
    route: str
    norm: float
    trace: float
    largest: float
    sketches: dict[str, str]
    sidecars: dict[str, Sidecar]


class MeasuredGains(BaseModel):
    """Measured gains of the store's experts for one target (``pimerge rank --calibrate``).

    Attributes:
        task_sha256: hash of the target's task and data at the measurement.
        examples: number of the target's examples that were used.
        sources: name → SHA-256 of its tensors, and the gain in accuracy over the bare base at each strength.
    """

    model_config = ConfigDict(extra="forbid")

    task_sha256: str
    examples: int
    sources: dict[str, tuple[str, dict[str, float]]]


class StoreDocument(BaseModel):
    """The content of ``embeddings.json``."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA
    experts: dict[str, Embedding] = Field(default_factory=dict)
    gains: dict[str, MeasuredGains] = Field(default_factory=dict)


def read_document(path: Path, *, is_overlay: bool = False) -> StoreDocument:
    """Read the document with its experts in alphabetical order; return an empty one if the file does not exist.

    Args:
        is_overlay: whether it may name sidecars outside its folder; a document of somebody else must not.
    """
    if not path.exists():
        return StoreDocument()
    require_no_device(path)
    document = None
    with suppress(OSError, ValidationError):  # the fast way; on a failure the slow way below says what is wrong
        document = StoreDocument.model_validate_json(path.read_bytes())
    if document is None or "schema_version" not in document.model_fields_set or document.schema_version != SCHEMA:
        content = read_json(path)
        found = content.get("schema_version") if isinstance(content, dict) else None
        if found != SCHEMA:
            raise PimergeError(
                f"'{path}' has the schema version {found}, expected {SCHEMA}",
                "it is not a store or is of another version: remove it, or pass another --store",
            )
        document = parse_document(StoreDocument, path, "remove the file and run 'pimerge embed' again")
    sidecars = [each.file for entry in document.experts.values() for each in entry.sidecars.values()]
    outside = next((file for file in sidecars if not (is_overlay or is_inside(file))), None)
    if outside is not None:
        raise PimergeError(
            f"'{path}' names the sidecar '{outside}', which is outside its folder",
            "pimerge has not written it: remove it, or pass another --store",
        )
    document.experts = dict(sorted(document.experts.items()))
    return document
