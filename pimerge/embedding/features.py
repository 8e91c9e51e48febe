"""Candidates forwarded over the target's examples: the vectors that the task head reads, and its answers.

Every candidate is an expert at one of its strengths (:mod:`pimerge.embedding.strengths`). One pass per strength gives
the vectors and the answers of the candidate's own head; they are cached by the hashes of expert, base and data, so
ranking again, or by another measure, forwards nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pimerge.adapters.expert import Expert
from pimerge.adapters.expert_files import CONFIG
from pimerge.adapters.head import task_of
from pimerge.adapters.ranking_document import Seen
from pimerge.checkpoints.base import Base
from pimerge.core.errors import PimergeError
from pimerge.core.files import sha256_file
from pimerge.core.progress import Advance
from pimerge.embedding.embed_expert import default_batch_tokens
from pimerge.embedding.feature_cache import FeatureCache
from pimerge.embedding.strengths import models_at_strengths, strengths_of
from pimerge.models.heads import head_of_size, set_head
from pimerge.models.injection import injected_sum, peft_prefix
from pimerge.models.loaded_base import LoadedBase, in_head, most_virtual_tokens
from pimerge.tasks.examples import Examples, bucket_by_length
from pimerge.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TargetFeatures:
    """n examples of the target, seen through the base or through the base with one candidate expert.

    Attributes:
        vectors: (n × d) float64, what the task head reads of each example.
        labels: (n) int64, the target's classes 0 … classes − 1.
        classes: how many classes the target has; at least two of them are in ``labels``.
        logits: (n × classes of the candidate's own head), what that head answers; None without a head.
        losses: (n) −log p(y|x) of the target's labels, by a head for these labels; None without one.
    """

    vectors: Tensor
    labels: Tensor
    classes: int
    logits: Tensor | None = None
    losses: Tensor | None = None


def why_not(task: Task) -> str:
    """Why experts cannot be ranked by the examples of a task; empty if they can."""
    if task.of_words:
        return "the task's classes are those of words, and a ranking by examples needs one of each example"
    return "" if task.labels else "the task has no classes, which a ranking by examples needs"


@dataclass(frozen=True)
class Sampling:
    """Which of the target's examples are looked at.

    Attributes:
        role: ``train`` or ``test``.
        shots: examples per class; None for all.
        limit: most examples in all; None for no limit.
        seed: of the sampling.
    """

    role: str = "train"
    shots: int | None = None
    limit: int | None = None
    seed: int = 0


class FeatureReader:
    """The target's examples, encoded once, and how each candidate sees them.

    Args:
        loaded: the base with a head for the target's labels.
        base: its identity.
        task: the target's.
        sampling: which examples.
        cache: a folder for what has been computed; None computes every time, and so does one that cannot be
            written to.
        advance: told how many examples were forwarded.

    """

    def __init__(
        self,
        loaded: LoadedBase,
        base: Base,
        task: Task,
        sampling: Sampling,
        cache: Path | None = None,
        advance: Advance = lambda count: None,
    ) -> None:
        self.loaded, self.base, self.task, self.sampling = loaded, base, task, sampling
        self.advance = advance
        self._trains_head: bool = task.type.trains_head
        self.examples, labels = task.examples(
            sampling.role,
            loaded.processor,
            loaded.config,
            shots=sampling.shots,
            seed=sampling.seed,
            limit=sampling.limit,
        )
        if reason := why_not(task):
            raise PimergeError(reason, "use a measure of the store, such as --measure fisher")
        if len(set(labels)) < 2:
            raise PimergeError(
                f"all {len(labels)} examples of '{task.path}' are of the class '{task.labels[labels[0]]}'",
                "a ranking by examples needs at least two classes: label some of another one, or rank by a measure "
                "of the store",
            )
        self.labels = torch.tensor(labels)
        parameter = next(loaded.model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._tokens = default_batch_tokens(self._device, loaded.config)
        self._encoded: dict[int | None, Examples] = {self._room(): self.examples}
        data = [task.sha256(), *astuple(sampling), base.identity, str(self._dtype)]
        self._cache = FeatureCache(cache, data)

    def seen(self) -> Seen:
        """Which examples these are, for the ranking."""
        counts = self.labels.bincount(minlength=len(self.task.labels)).tolist()
        return Seen(
            examples=len(self.labels),
            per_class=dict(zip(self.task.labels, counts, strict=True)),
            shots=self.sampling.shots,
            limit=self.sampling.limit,
            seed=self.sampling.seed,
        )

    @property
    def holds_out(self) -> bool:
        """Whether some of the examples can be held out to test a head: a class has two of them."""
        return int(self.labels.bincount().max()) > 1

    def notes(self) -> list[str]:
        """Remarks on the examples for readers of the ranking."""
        counts = self.labels.bincount(minlength=len(self.task.labels)).tolist()
        missing = [name for name, count in zip(self.task.labels, counts, strict=True) if not count]
        found = list(self._cache.notes)
        if self.examples.truncated:
            found.append(f"{self.examples.truncated} examples are longer than the model takes and were cut")
        if missing:
            found.append(f"no example of {', '.join(missing)}: the ranking is about the other classes")
        if not self.holds_out:
            found.append(
                "with one example of a class nothing can be held out, and no measure of so few is reliable: no expert "
                "is expected to help"
            )
        return found

    def base_features(self) -> TargetFeatures:
        """The examples' features under the bare base, which is strength 0 of every expert."""
        return self._features(self._cache.get("base", lambda: self._read(self.loaded.model)), "")

    def features(self, expert: Expert) -> dict[float, TargetFeatures]:
        """Strength → the examples' features under the base with the expert."""
        found = self._cache.get(_identity(expert), lambda: self._candidate(expert))
        return {strength: self._features(found, f"{strength}.") for strength in strengths_of(expert)}

    def with_losses(
        self, expert: Expert, samples: Mapping[float, TargetFeatures], target: Expert | None
    ) -> dict[float, TargetFeatures]:
        """The features with losses: by the candidate's own head if it has the target's labels, else by the target's.

        Args:
            target: the target's own expert, if it has one; its head answers on the candidate's vectors.
        """
        own = task_of(expert)
        if self._trains_head and (own is None or own.labels != self.task.labels or not self._answers(expert)):
            if target is None or not self._answers(target):
                return dict(samples)
            key = f"{_identity(expert)} answered by {_identity(target)}"
            found = self._cache.get(key, lambda: self._candidate(expert, target))
            samples = {strength: self._features(found, f"{strength}.") for strength in strengths_of(expert)}
        if any(sample.logits is None for sample in samples.values()):  # answers that are generated have no likelihoods
            return dict(samples)
        return {strength: _lossy(sample) for strength, sample in samples.items()}

    def mean_features(self, experts: Sequence[Expert]) -> TargetFeatures:
        """The examples' features under the base with the mean of several experts, each at its strength."""

        def compute() -> dict[str, Tensor]:
            with injected_sum(experts, [1 / len(experts)] * len(experts), self.loaded) as model:
                return self._read(model, experts)

        return self._features(self._cache.get("mean of " + " + ".join(map(_identity, experts)), compute), "")

    def _features(self, found: Mapping[str, Tensor], prefix: str) -> TargetFeatures:
        logits = found.get(f"{prefix}logits")
        return TargetFeatures(
            found[f"{prefix}vectors"].double(),
            self.labels,
            len(self.task.labels),
            None if logits is None else logits.double(),
        )

    def _answers(self, expert: Expert) -> bool:
        """Whether an expert can answer on the base: its head's labels are known, and no part lies in the backbone.

        Where the base answers in text, every expert does, and to the target's own classes.
        """
        return not self._trains_head or (
            bool(expert.head)
            and task_of(expert) is not None
            and all(in_head(name, self.loaded.head) for name in expert.head)
        )

    def _candidate(self, expert: Expert, head_of: Expert | None = None) -> dict[str, Tensor]:
        """One pass per strength, with the expert's own head or with another's."""
        answering = head_of or expert
        answers = self._answers(answering)
        own = task_of(answering) if answers and self._trains_head else None
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            if own is not None:
                stack.enter_context(head_of_size(self.loaded, self.base, self.task, len(own.labels)))
            for strength, model in models_at_strengths(expert, self.loaded):
                if own is not None:
                    set_head(model, answering.head_tensors())
                found |= self._read(model, [expert], f"{strength}.", answers=answers)
        return found

    def _room(self, experts: Sequence[Expert] = ()) -> int | None:
        """Tokens left for a text after the vectors that experts put before it; None if there is no limit."""
        return getattr(self.loaded.config_for(experts), "max_position_embeddings", None)

    def _examples_for(self, experts: Sequence[Expert]) -> Examples:
        """The examples, cut a little more where they have to leave room."""
        room, sampling = self._room(experts), self.sampling
        if room not in self._encoded:
            self._encoded[room], _ = self.task.examples(
                sampling.role,
                self.loaded.processor,
                self.loaded.config_for(experts),
                shots=sampling.shots,
                seed=sampling.seed,
                limit=sampling.limit,
            )
        return self._encoded[room]

    def _read(
        self, model: nn.Module, experts: Sequence[Expert] = (), prefix: str = "", *, answers: bool = False
    ) -> dict[str, Tensor]:
        """One pass over the examples: what the head reads of each and, where asked for, what it answers.

        Args:
            experts: those in the model.
        """
        examples = self._examples_for(experts)
        vectors: list[Tensor] = [torch.empty(0)] * len(examples)
        logits: list[Tensor] = []
        batches = bucket_by_length(examples.lengths, self._tokens, padded=not most_virtual_tokens(experts))
        reading = self._reading(model)
        for indices in batches:
            read, answered = self.task.type.read(model, reading, examples, indices, answers)
            for index, vector in zip(indices, read.float().cpu(), strict=True):
                vectors[index] = vector
            if answered is not None:
                logits.append(answered.float().cpu())
            self.advance(len(indices))
        found = {f"{prefix}vectors": torch.stack(vectors)}
        if logits:
            order = torch.tensor([index for indices in batches for index in indices])
            found[f"{prefix}logits"] = torch.cat(logits)[order.argsort()]
        if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
            raise PimergeError("the features hold NaN or Inf", "compute them with --dtype float32")
        return found

    def _reading(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules whose input is the feature (the first one that runs): the head, or the language model head."""
        if not self._trains_head:
            return {"output": self.loaded.model.get_output_embeddings()}  # type: ignore[operator]
        names, prefix = dict(model.named_modules()), peft_prefix(model)
        return {name: names[prefix + name] for name in self.loaded.head if prefix + name in names}


def _identity(expert: Expert) -> str:
    """A text that identifies an expert's update: hashes of its files, and its strength."""
    return f"{expert.sha256} {sha256_file(expert.path / CONFIG)} {expert.strength}"


def _lossy(sample: TargetFeatures) -> TargetFeatures:
    assert sample.logits is not None
    return replace(sample, losses=cross_entropy(sample.logits, sample.labels, reduction="none"))
