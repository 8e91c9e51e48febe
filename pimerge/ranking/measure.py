"""Measures of how much an expert helps a target: what each of them needs, and the functions that it provides.

Higher is better. A measure of the store compares embeddings (``similarity``), a measure of examples looks at the
target's labelled examples through each candidate (``scores``), and a measure of the history predicts from the gains
that ``pimerge rank --calibrate`` measured (``predict``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from pimerge.core.plugins import Family, Strategy

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.adapters.expert import Expert
    from pimerge.checkpoints.safetensors_file import TensorFile
    from pimerge.embedding.features import TargetFeatures
    from pimerge.embedding.store_view import StoreView
    from pimerge.ranking.cosine import Similarity


class Needs(StrEnum):
    """The inputs of a measure."""

    FISHER = "fisher"
    SECOND_MOMENTS = "marginals"
    EXPERTS = "experts"
    EXAMPLES = "examples"
    HISTORY = "history"

    @property
    def text(self) -> str:
        """The inputs that the user must have."""
        return {
            Needs.FISHER: "the store",
            Needs.SECOND_MOMENTS: "the store",
            Needs.EXPERTS: "the store and the experts' files",
            Needs.EXAMPLES: "a few labelled examples of the target",
            Needs.HISTORY: "the store after 'pimerge rank --calibrate'",
        }[self]


class SimilarityFunction(Protocol):
    """Compare the target with candidates by their embeddings."""

    def __call__(
        self, members: Sequence[StoreView], candidates: int, pool: Sequence[int], sampled: bool = False, /
    ) -> Similarity:
        """Compare ``members[0]``, the target, with the ``candidates`` members after it.

        Args:
            pool: the members whose mean stands for the whole pool.
            sampled: whether the pool is a sample of a much larger one.
        """


def _no_similarity(
    members: Sequence[StoreView], candidates: int, pool: Sequence[int], sampled: bool = False, /
) -> Similarity:
    raise AssertionError("this measure does not compare embeddings")


def _no_scores(features: TargetFeatures, weights: Tensor) -> Tensor:
    raise AssertionError("this measure does not look at examples")


def _no_prediction(
    gains: Mapping[str, Mapping[str, Mapping[float, float]]], similarities: Mapping[str, float], source: str
) -> tuple[float, float, float] | None:
    raise AssertionError("this measure does not read a history")


@dataclass(frozen=True, kw_only=True)
class Measure(Strategy):
    """A measure.

    Attributes:
        needs: what it is computed from, and so which of the three functions it has.
        similarity: of a measure of the store.
        threshold: a candidate is expected to help if its similarity is above this.
        same_basis: whether it compares factor by factor, which is defined only for experts of one rank and one set of
            modules that were trained from one init.
        needs_update: whether the target must have updates ΔW.
        remark: what a reader should know of a comparison of some experts; empty if nothing.
        of_files: the similarity of plain files of tensors over some keys, after subtracting what all were trained from;
            None if the measure needs more than the files.
        scores: of a measure of examples: one score for each row of the weights (draws × n), which say how often each
            example counts in a draw of the bootstrap.
        reads_answers: whether it looks at what a head answers, which the bare base has none for.
        held_out: whether it tests on held-out examples, so that a repeated example is not the same as a weight of two.
        least_per_class: how many examples some class must have.
        is_gain: whether the score above the base's is the expected gain in accuracy itself.
        predict: of a measure of the history: (target → source → strength → gain, target → similarity, source) → the
            source's best strength, its expected gain there and the standard error of that; None for an unknown source.
    """

    needs: Needs
    similarity: SimilarityFunction = _no_similarity
    threshold: float = 0.0
    same_basis: bool = False
    needs_update: bool = False
    remark: Callable[[Sequence[Expert]], str] = lambda experts: ""
    of_files: Callable[[Sequence[TensorFile], Sequence[str], TensorFile | None], Similarity] | None = None
    scores: Callable[[TargetFeatures, Tensor], Tensor] = _no_scores
    reads_answers: bool = False
    held_out: bool = False
    least_per_class: int = 1
    is_gain: bool = False
    predict: Callable[
        [Mapping[str, Mapping[str, Mapping[float, float]]], Mapping[str, float], str], tuple[float, float, float] | None
    ] = _no_prediction

    @property
    def compares_embeddings(self) -> bool:
        """Whether the store decides, by similarity."""
        return self.needs in (Needs.FISHER, Needs.SECOND_MOMENTS, Needs.EXPERTS)

    @property
    def any_kind(self) -> bool:
        """Whether it compares experts of different kinds: by their layers' second moments or by ΔW alone."""
        return not self.same_basis and (self.needs is Needs.SECOND_MOMENTS or self.needs_update)

    @property
    def requirements(self) -> str:
        """The inputs that the user must have, for listings."""
        return "; ".join(
            [
                self.needs.text + (f", at least {self.least_per_class} of a class" if self.least_per_class > 1 else ""),
                *(["experts of one rank and init"] if self.same_basis else []),
                *(["the candidate's own head"] if self.reads_answers else []),
            ]
        )


MEASURES = Family("pimerge.ranking.measures", "measure", "MEASURE", Measure)
BY_EXAMPLES, BY_STORE, BY_FILES = "combined", "fisher", "parameters"
"""The measures where none is asked for: if the target's examples can be read, if not, and of plain files of tensors."""
