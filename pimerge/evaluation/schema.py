"""The document ``comparison.json``: runs of tune methods and controls at equal budget, and their summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pimerge.core.documents import parse_document
from pimerge.core.errors import PimergeError

SCHEMA = 1


class ComparisonRun(BaseModel):
    """One method, trained once and scored.

    Attributes:
        method: a tune method or a control, as ``--methods`` names it.
        shots: training examples of each class; None for all. ``seed`` decides which, and all else.
        k: how many of the ranked experts the method had.
        experts: the experts in the result.
        scores: of the task's first metric, by test set: ``test``, and the name of each further one.
        losses: mean −log p(y|x) in nats, by test set.
        trained_parameters: numbers that trained; ``deployed_parameters``: that the result adds to the base.
        seconds: from composing to the trained result, without its scoring.
        class_names: whether the names of the classes were examples as well.
    """

    model_config = ConfigDict(extra="forbid")

    method: str
    shots: int | None
    seed: int
    k: int
    experts: list[str]
    scores: dict[str, float]
    losses: dict[str, float]
    trained_parameters: int
    deployed_parameters: int
    epochs: float
    seconds: float
    class_names: bool = False


class ComparisonLine(BaseModel):
    """A method over its seeds, at one number of shots and of experts, on one test set.

    Attributes:
        control: whether it is one of the controls.
        mean, sd: of the scores over the seeds.
        difference, low, high: paired difference to the best control, seed by seed, with its 95 % interval (t); None
            for that control itself, and the interval with one seed.
    """

    model_config = ConfigDict(extra="forbid")

    method: str
    control: bool
    shots: int | None
    k: int
    test: str
    seeds: int
    mean: float
    sd: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    trained_parameters: int
    deployed_parameters: int
    seconds: float


class ComparisonDocument(BaseModel):
    """``comparison.json``.

    Attributes:
        metric: the task's first, which all scores are of.
        options: budget and learning rates, the same for all.
        experts: of the ranking, best first.
        conclusion: one sentence: which method won, or that none is distinguishable.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA
    target: str
    base: str
    metric: str
    options: dict[str, Any]
    experts: list[str]
    runs: list[ComparisonRun]
    lines: list[ComparisonLine]
    conclusion: str


def read_comparison(path: Path) -> ComparisonDocument:
    """Read ``comparison.json``."""
    if not path.is_file():
        raise PimergeError(f"there is no comparison '{path}'", "run 'pimerge compare --target NAME' first")
    return parse_document(ComparisonDocument, path, "run 'pimerge compare' again")
