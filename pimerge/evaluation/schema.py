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
        shots: training examples per class; None for all.
        seed: seed of the sampling and of the training.
        k: number of ranked experts that the method used.
        experts: the experts in the result.
        scores: test set → score by the task's first metric; the sets are ``test`` and the further tests by name.
        losses: test set → mean −log p(y|x) in nats.
        trained_parameters: number of trained parameters.
        deployed_parameters: number of parameters that the result adds to the base.
        seconds: duration of the training, without scoring.
        class_names: whether the names of the classes were used as examples.
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
        control: whether the method is a control.
        mean, sd: mean and standard deviation of the scores over the seeds.
        difference, low, high: mean of the paired differences to the best control, with its 95 % t-interval. None for
            the best control; with one seed there is no interval.
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
        metric: the metric of all scores, the task's first.
        options: budget and learning rates of all runs.
        experts: names of the experts in the pool.
        conclusion: a sentence that says which method won, or that none can be told from the best control.
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
