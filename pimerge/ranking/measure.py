"""The family of measures: scores for how much an expert is expected to help a target.

Higher is better. A measure of the store compares embeddings (``similarity``). A measure of examples scores the features
of the target's labelled examples under each candidate (``scores``). A measure of the history predicts from the gains
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
    """Input of a measure."""

    FISHER = "fisher"
    SECOND_MOMENTS = "marginals"
    EXPERTS = "experts"
    EXAMPLES = "examples"
    HISTORY = "history"

    @property
    def text(self) -> str:
        """The input in words."""
        return {
            Needs.FISHER: "the store",
            Needs.SECOND_MOMENTS: "the store",
            Needs.EXPERTS: "the store and the experts' files",
            Needs.EXAMPLES: "a few labelled examples of the target",
            Needs.HISTORY: "the store after 'pimerge rank --calibrate'",
        }[self]


class SimilarityFunction(Protocol):
    """Compares the target with candidates by their embeddings."""

    def __call__(
        self, members: Sequence[StoreView], candidates: int, pool: Sequence[int], sampled: bool = False, /
    ) -> Similarity:
        """Compare ``members[0]``, the target, with the ``candidates`` members after it.

        Args:
            pool: indices of the members whose mean is subtracted.
            sampled: whether these are a sample of a much larger pool.
        """


def _no_similarity(
    members: Sequence[StoreView], candidates: int, pool: Sequence[int], sampled: bool = False, /
) -> Similarity:
    raise AssertionError("this measure does not compare embeddings")


def _no_scores(features: TargetFeatures, weights: Tensor) -> Tensor:
    raise AssertionError("this measure does not score examples")


def _no_prediction(
    gains: Mapping[str, Mapping[str, Mapping[float, float]]], similarities: Mapping[str, float], source: str
) -> tuple[float, float, float] | None:
    raise AssertionError("this measure does not read a history")


@dataclass(frozen=True, kw_only=True)
class Measure(Strategy):
    """A measure.

    Attributes:
        needs: the input, which decides which of the functions ``similarity``, ``scores`` and ``predict`` it has.
        similarity: compares embeddings, for a measure of the store.
        threshold: a candidate is expected to help if its similarity exceeds this.
        same_basis: whether it compares factors, which is defined only for experts with the same rank, modules and init.
        needs_update: whether the target must have updates ΔW.
        remark: returns a remark on a comparison of the given experts, for readers of the ranking; empty without one.
        of_files: compares plain files of tensors by some keys, after subtracting the file from which all were trained;
            None if the measure needs more than the files.
        scores: for a measure of examples: returns a score for each row of the weights (draws × n), the number of times
            that each example counts in a bootstrap sample.
        reads_answers: whether it reads the output of a head, which the bare base may not have.
        held_out: whether it tests on held-out examples; repeating an example is then not the same as a weight of 2.
        least_per_class: how many examples at least one class must have.
        is_gain: whether the difference of the score to the base's is the expected gain in accuracy.
        predict: for a measure of the history: (target → source → strength → gain, target → similarity, source) → the
            source's best strength, its expected gain and the standard error of the gain; None for an unknown source.
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
        """Whether it compares embeddings of the store."""
        return self.needs in (Needs.FISHER, Needs.SECOND_MOMENTS, Needs.EXPERTS)

    @property
    def any_kind(self) -> bool:
        """Whether it compares experts of different kinds, by second moments or by ΔW."""
        return not self.same_basis and (self.needs is Needs.SECOND_MOMENTS or self.needs_update)

    @property
    def requirements(self) -> str:
        """The requirements in words, for listings."""
        return "; ".join(
            [
                self.needs.text + (f", at least {self.least_per_class} of a class" if self.least_per_class > 1 else ""),
                *(["experts of one rank and init"] if self.same_basis else []),
                *(["the candidate's own head"] if self.reads_answers else []),
            ]
        )


MEASURES = Family("pimerge.ranking.measures", "measure", "MEASURE", Measure)
BY_EXAMPLES, BY_STORE, BY_FILES, BY_UPDATES = "combined", "fisher", "parameters", "delta"
"""Default measures: if the target's examples can be read, if not, and for plain files of tensors."""
