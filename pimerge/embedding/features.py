"""Features of the target's examples under each candidate: the vectors that the task head reads, and its logits.

A candidate is an expert at one of its strengths (:mod:`pimerge.embedding.strengths`). One pass per strength gives the
vectors and the logits of the candidate's own head. Both are cached by the hashes of expert, base and data, so ranking
again, or by another measure, needs no forward pass.
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
from pimerge.adapters.head import task_of
from pimerge.adapters.ranking_document import Seen
from pimerge.checkpoints.base import Base
from pimerge.core.errors import PimergeError
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
    """Features of n examples of the target under the base, or under the base with one candidate.

    Attributes:
        vectors: (n × d) float64, the vector that the task head reads for each example.
        labels: (n) int64, the target's classes 0 … classes − 1.
        classes: number of classes of the target; at least two of them are in ``labels``.
        logits: (n × classes of the candidate's own head), the output of that head; None without a head.
        losses: (n) −log p(y|x) by a head for the target's labels; None without such a head.
    """

    vectors: Tensor
    labels: Tensor
    classes: int
    logits: Tensor | None = None
    losses: Tensor | None = None


def why_not(task: Task) -> str:
    """Say why experts cannot be ranked by the examples of a task; empty if they can."""
    if task.of_words:
        return "the task has a class per word, and a ranking by examples needs a class per example"
    return "" if task.labels else "the task has no classes, which a ranking by examples needs"


@dataclass(frozen=True)
class Sampling:
    """Which of the target's examples are used.

    Attributes:
        role: the split, ``train`` or ``test``.
        shots: examples per class; None uses all.
        limit: maximum number of examples; None sets no limit.
        seed: seed of the sampling.
    """

    role: str = "train"
    shots: int | None = None
    limit: int | None = None
    seed: int = 0


class FeatureReader:
    """Computes the features of the target's examples, which are encoded once, under each candidate.

    Args:
        loaded: the base with a head for the target's labels.
        base: the base's identity.
        task: the target's task.
        sampling: which examples are used.
        cache: folder of the feature cache; None disables it.
        advance: called with the number of examples after each forward pass.
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
        self.examples, labels = self._encode()
        if reason := why_not(task):
            raise PimergeError(reason, "use a measure of the store, such as --measure fisher")
        if len(set(labels)) < 2:
            raise PimergeError(
                f"all {len(labels)} examples of '{task.path}' are of the class '{task.labels[labels[0]]}'",
                "a ranking by examples needs at least two classes: label examples of another class, or rank by a "
                "measure of the store",
            )
        self.labels = torch.tensor(labels)
        parameter = next(loaded.model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._tokens = default_batch_tokens(self._device, loaded.config)
        self._encoded: dict[int | None, Examples] = {self._room(): self.examples}
        data = [task.sha256(), *astuple(sampling), base.identity, str(self._dtype)]
        self._cache = FeatureCache(cache, data)

    def seen(self) -> Seen:
        """Describe the examples for the ranking."""
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
        """Whether some examples can be held out to test a head, which takes two examples of a class."""
        return int(self.labels.bincount().max()) > 1

    def notes(self) -> list[str]:
        """Return remarks on the examples for readers of the ranking."""
        counts = self.labels.bincount(minlength=len(self.task.labels)).tolist()
        missing = [name for name, count in zip(self.task.labels, counts, strict=True) if not count]
        found = list(self._cache.notes)
        found += self.examples.remarks()
        if missing:
            found.append(f"no example of {', '.join(missing)}: the ranking is about the other classes")
        if not self.holds_out:
            found.append(
                "with one example per class nothing can be held out, and no measure is reliable, so no expert is "
                "expected to help"
            )
        return found

    def base_features(self) -> TargetFeatures:
        """Return the features under the bare base, which is every expert at strength 0."""
        return self._features(self._cache.get("base", lambda: self._read(self.loaded.model)), "")

    def features(self, expert: Expert) -> dict[float, TargetFeatures]:
        """Return strength → features under the base with the expert."""
        found = self._cache.get(_identity(expert), lambda: self._candidate(expert))
        return {strength: self._features(found, f"{strength}.") for strength in strengths_of(expert)}

    def with_losses(
        self, expert: Expert, samples: Mapping[float, TargetFeatures], target: Expert | None
    ) -> dict[float, TargetFeatures]:
        """Add losses to the features: by the candidate's own head if its labels are the target's, else by the target's.

        Args:
            target: the target's own expert, if it has one; its head is applied to the candidate's vectors.
        """
        own = task_of(expert)
        if self._trains_head and (own is None or own.labels != self.task.labels or not self._answers(expert)):
            if target is None or not self._answers(target):
                return dict(samples)
            key = f"{_identity(expert)} answered by {_identity(target)}"
            found = self._cache.get(key, lambda: self._candidate(expert, target))
            samples = {strength: self._features(found, f"{strength}.") for strength in strengths_of(expert)}
        if any(sample.logits is None for sample in samples.values()):  # generated answers have no likelihoods
            return dict(samples)
        return {strength: _with_losses(sample) for strength, sample in samples.items()}

    def mean_features(self, experts: Sequence[Expert]) -> TargetFeatures:
        """Return the features under the base with the mean of several experts, each at its strength."""

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
        """Whether an expert can answer: the labels of its head are known, and the head is the base's head alone.

        If the base answers in text, every expert answers, with the target's own classes.
        """
        return not self._trains_head or (
            bool(expert.head)
            and task_of(expert) is not None
            and all(in_head(name, self.loaded.head) for name in expert.head)
        )

    def _candidate(self, expert: Expert, head_of: Expert | None = None) -> dict[str, Tensor]:
        """Run one pass per strength, with the head of the expert or of another one."""
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

    def _encode(self, experts: Sequence[Expert] = ()) -> tuple[Examples, list[int]]:
        """Encode the examples for the base with some experts; return them with their labels."""
        how, config = self.sampling, self.loaded.config_for(experts)
        return self.task.examples(
            how.role, self.loaded.processor, config, shots=how.shots, seed=how.seed, limit=how.limit
        )

    def _room(self, experts: Sequence[Expert] = ()) -> int | None:
        """Return the number of tokens for a text after the experts' virtual tokens; None without a maximum length."""
        return getattr(self.loaded.config_for(experts), "max_position_embeddings", None)

    def _examples_for(self, experts: Sequence[Expert]) -> Examples:
        """Return the examples, cut to the length that the experts' virtual tokens leave."""
        room = self._room(experts)
        if room not in self._encoded:
            self._encoded[room], _ = self._encode(experts)
        return self._encoded[room]

    def _read(
        self, model: nn.Module, experts: Sequence[Expert] = (), prefix: str = "", *, answers: bool = False
    ) -> dict[str, Tensor]:
        """Run one pass over the examples and return the head's input vectors and, if ``answers``, its logits.

        Args:
            experts: the experts in the model.
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
        """Return the modules whose input is read, the first that runs: the head, or the output embeddings."""
        if not self._trains_head:
            return {"output": self.loaded.model.get_output_embeddings()}  # type: ignore[operator]
        names, prefix = dict(model.named_modules()), peft_prefix(model)
        return {name: names[prefix + name] for name in self.loaded.head if prefix + name in names}


def _identity(expert: Expert) -> str:
    """Return the identity of an expert's update: its tensors, its config with the scalings, and its strength."""
    return f"{expert.sha256} {expert.config_sha256} {expert.strength}"


def _with_losses(sample: TargetFeatures) -> TargetFeatures:
    assert sample.logits is not None
    return replace(sample, losses=cross_entropy(sample.logits, sample.labels, reduction="none"))
