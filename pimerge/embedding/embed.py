"""``pimerge.embed``: add the Fisher embeddings of a pool of experts to a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pimerge.adapters.compatibility import check_expert
from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.selected import distinguished, listed, pool_members
from pimerge.core.arguments import checked_arguments
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.progress import Note, Track, silent, unheard
from pimerge.embedding.embed_expert import EmbedOptions, EmbedOutcome, LabelMode, embed_expert
from pimerge.embedding.store import Store
from pimerge.embedding.store_schema import Embedding, EmbedSettings
from pimerge.models.loading import Bases, resolve_device, resolve_dtype
from pimerge.tasks.task import Task, TaskSource, open_task


@dataclass(frozen=True)
class EmbedResult:
    """Result of :func:`embed`.

    Attributes:
        store: the path of ``embeddings.json``.
        experts: name → entry of the store, for each of the given experts.
        computed: names of the experts that were embedded by this call; the other embeddings were up to date.
        skipped: reasons why some experts could not be embedded.
        stored: number of experts in the store.
    """

    store: Path
    experts: dict[str, Embedding]
    computed: list[str]
    skipped: list[str]
    stored: int

    def to_dict(self) -> dict[str, Any]:
        """Return the document that ``pimerge embed --json`` prints."""
        return {
            "store": str(self.store),
            "computed": self.computed,
            "skipped": self.skipped,
            "experts": {name: entry.model_dump(exclude={"settings"}) for name, entry in self.experts.items()},
        }


@checked_arguments(examples=1, shots=1, batch_tokens=1)
def embed(
    experts: str | Path | Expert | Sequence[str | Path | Expert] = "experts",
    *,
    store: str | Path = "embeddings.json",
    task: TaskSource | None = None,
    examples: int = 1000,
    labels: str = LabelMode.TRUE,
    shots: int | None = None,
    up_to_shots: bool = False,
    seed: int = 0,
    grams: bool = False,
    batch_tokens: int | None = None,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    skip_broken: bool = False,
    force: bool = False,
    track: Track = silent,
    note: Note = unheard,
    warn: Note = unheard,
) -> EmbedResult:
    """Embed every expert of a pool by the Fisher information of its parameters, into the store.

        F_i = (1/M) Σ_m (∂ log p(y_m | x_m) / ∂φ_i)²        (π-Tuning, arXiv 2304.14381, eq. 3)

    over M examples of the training split of the expert's task. Squares are taken per example. The store also receives
    the second moments of the adapted layers (:mod:`pimerge.embedding.layer_moments`), which the measures of ``rank``
    compare. Each embedding is written as soon as it is computed, and the embedding of an unchanged expert is kept, so
    an interrupted call continues when it is repeated.

    Args:
        experts: pools (folders of experts), folders of experts, Hub ids (``org/name@revision``) or open experts.
        store: the ``embeddings.json`` to extend; its tensors are in the folder ``embeddings`` beside it.
        task: the task of all these experts, instead of each expert's own ``task.json``: a folder, a task, or rows in
            memory (a ``datasets.Dataset`` or a list of dicts).
        examples: maximum number of examples from each expert's training split.
        labels: ``true`` (the labels of the data) or ``sampled`` (labels sampled from the model's predictions).
        shots: training examples per class; None uses all.
        up_to_shots: take all examples of a class that has fewer than ``shots``, instead of refusing.
        seed: seed of the sampling.
        grams: also collect the input Grams, which ``merge(method="regmean")`` needs.
        batch_tokens: maximum number of tokens per batch; the default depends on the device.
        base: the base model, a folder or Hub id, instead of the one that each expert names.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ….
        dtype: ``auto`` (bfloat16 on a GPU, otherwise float32), ``float32``, ``bfloat16`` or ``float64``.
        skip_broken: if some experts have a problem, embed the others.
        force: compute embeddings that the store already holds.
        track: shows progress.
        note: receives remarks, one sentence at a time.
        warn: receives warnings, one sentence at a time.

    Returns:
        the entries of the store, and the names of the experts that were embedded by this call.

    Example:
        In a folder that holds ``experts/``::

            result = pimerge.embed("experts", shots=16)
            {name: entry.norm for name, entry in result.experts.items()}
    """
    if labels not in list(LabelMode):
        raise PimergeError(f"--labels must be {' or '.join(LabelMode)}; got '{labels}'")
    target = Store(Path(store))
    target.tidy()
    ready, problems = _checked(listed(experts) or [], base, None if task is None else open_task(task), target)
    if not skip_broken or not ready:
        problems.raise_any("some experts cannot be embedded (--skip-broken embeds the others)")
    for problem in problems.found:
        warn(f"skipped {problem.message}")
    for name in [name for name in target.experts if not target.folder_of(name).is_dir()]:
        target.drop(name)
        note(f"{name}: its folder is gone; removed from the store")
    ready = [(expert, replace(own, up_to_shots=up_to_shots)) for expert, own in ready]
    resolved = resolve_device(device)
    bases = Bases(resolved, resolve_dtype(dtype, resolved))
    # experts with the same base and number of labels follow each other, so that the base is loaded once
    ready.sort(key=lambda pair: (pair[0].base.identity, pair[1].file.type, len(pair[1].labels)))
    settings = EmbedSettings(labels=labels, max_examples=examples, shots=shots, seed=seed)
    options = EmbedOptions(batch_tokens, grams, force)
    computed = []
    try:
        for number, (expert, own) in enumerate(ready, 1):
            note(f"[{number}/{len(ready)}] {expert.name}")
            outcome = embed_expert(expert, own, target, settings, bases, options, track=track)
            if outcome.computed:
                computed.append(expert.name)
            for remark in _remarks(outcome):
                note(f"{expert.name}: {remark}")
    except KeyboardInterrupt:
        note("interrupted: finished embeddings are in the store, and the same command continues from there")
        raise
    entries = {expert.name: target.experts[expert.name] for expert, _ in ready}
    if grams:
        note(f"Gram matrices: {sum(map(target.grams_size, entries)) / 1e6:.1f} MB")
    skipped = [problem.message for problem in problems.found]
    return EmbedResult(target.path, entries, computed, skipped, len(target.experts))


def _checked(
    members: Sequence[str | Path | Expert], base: str | None, task: Task | None, store: Store
) -> tuple[list[tuple[Expert, Task]], Problems]:
    """Open the experts of some pools with their tasks, and collect the problems of those that cannot be embedded."""
    found: list[str | Path | Expert] = []
    for member in members:
        found += [member] if isinstance(member, Expert) else pool_members([str(member)])
    problems = Problems()
    ready: list[tuple[Expert, Task]] = []
    for reference in found:
        with problems.collected(f"{reference}: " if len(found) > 1 and not isinstance(reference, Expert) else ""):
            expert = reference if isinstance(reference, Expert) else open_expert(reference, base)
            own = check_expert(expert, task)
            if all(expert.path.resolve() != other.path.resolve() for other, _ in ready):
                ready.append((expert, own))
    stored = {name: store.folder_of(name) for name in store.experts}
    experts = distinguished([expert for expert, _ in ready], stored)
    return [(expert, own) for expert, (_, own) in zip(experts, ready, strict=True)], problems


def _remarks(outcome: EmbedOutcome) -> list[str]:
    """Return remarks for the user on how an expert was embedded."""
    if not outcome.computed:
        return ["unchanged since it was embedded"]
    found = []
    if outcome.fisher and outcome.fisher.why_loop:
        found.append(f"one example at a time, since {outcome.fisher.why_loop}")
    found += outcome.remarks
    return found
