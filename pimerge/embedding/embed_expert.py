"""Embed one expert: compute its Fisher information and second moments, and add them to the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pimerge.adapters.expert import Expert
from pimerge.checkpoints.architecture import lora_targets
from pimerge.core.errors import PimergeError
from pimerge.core.progress import Track, silent
from pimerge.embedding.fisher import Fisher, diagonal_fisher
from pimerge.embedding.input_grams import input_grams, linear_layers
from pimerge.embedding.layer_moments import SecondMoments
from pimerge.embedding.random_projection import project, to_text, update_embedding
from pimerge.embedding.store import DIAGONAL, GRAMS, SECOND_MOMENTS, Store
from pimerge.embedding.store_schema import EmbedSettings
from pimerge.embedding.store_view import GRADIENT, UPDATE
from pimerge.models.injection import injected, peft_prefix
from pimerge.models.loaded_base import LoadedBase
from pimerge.models.loading import Bases
from pimerge.tasks.examples import Batch, Examples, bucket_by_length, on_device
from pimerge.tasks.label_order import label_order_remark
from pimerge.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor


class LabelMode(StrEnum):
    """Labels at which the Fisher information is computed."""

    TRUE = "true"
    """The labels of the data: the empirical Fisher."""
    SAMPLED = "sampled"
    """Labels sampled from the model's predictions."""


_JUDGED = 256
"""About how many examples judge the order of labels."""


@dataclass(frozen=True)
class EmbedOutcome:
    """Result of embedding one expert.

    Attributes:
        computed: False if the store already held an up-to-date embedding.
        fisher: the Fisher information; None if it was not computed.
        remarks: what is to be said about the expert and its examples.
    """

    name: str
    computed: bool
    fisher: Fisher | None = None
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class EmbedOptions:
    """Options of :func:`embed_expert` that do not change the Fisher information.

    Attributes:
        batch_tokens: maximum number of tokens per batch; None uses :func:`default_batch_tokens`.
        grams: also store the input Grams of the layers. An expert that already has them keeps them.
        force: compute the embedding even if the store already holds it.
    """

    batch_tokens: int | None = None
    grams: bool = False
    force: bool = False


def embed_expert(
    expert: Expert,
    task: Task,
    store: Store,
    settings: EmbedSettings,
    bases: Bases,
    options: EmbedOptions = EmbedOptions(),
    *,
    track: Track = silent,
) -> EmbedOutcome:
    """Embed one expert by the diagonal Fisher information of its parameters on the training split of its task.

    The head is needed for the likelihood but is not part of the embedding.

    Args:
        settings: label mode, number of examples and seed.
        bases: loads the base.
    """
    settings = settings.model_copy(update={"dtype": str(bases.dtype).removeprefix("torch.")})
    fields: dict[str, Any] = {
        "path": store.path_of(expert),
        "sha256": expert.sha256,
        "config_sha256": expert.config_sha256,
        "task_sha256": task.sha256(),
        "kind": expert.kind,
        "base": expert.base.identity,
        "settings": settings,
    }
    # only merges of ΔW read input Grams; existing ones are kept, so that embedding again does not break such a merge
    grams = bool(expert.modules) and (options.grams or store.has_grams(expert.name))
    if not options.force and store.is_current(expert.name, fields, grams):
        return EmbedOutcome(expert.name, computed=False)
    loaded = bases.load(expert.base, task)
    if not expert.head and not loaded.has_own_head:
        if order := loaded.other_order(task.labels):
            raise PimergeError(
                f"the expert '{expert.name}' has no head of its own, and {order}", "correct 'labels' in task.json"
            )
        raise PimergeError(
            f"the expert '{expert.name}' has no head for its task, and its base has none for these labels",
            "train it with modules_to_save, or pass the --base that it was trained on",
        )
    examples, classes = task.examples(
        "train",
        loaded.processor,
        loaded.config_for([expert]),
        shots=settings.shots,
        seed=settings.seed,
        limit=settings.max_examples,
    )
    tokens = options.batch_tokens or default_batch_tokens(bases.device, loaded.config)
    batches = bucket_by_length(examples.lengths, tokens if examples.alike else 1, padded=not expert.virtual_tokens)
    data = EncodedBatches(task, examples, classes, batches, bases.device)
    fisher, tensors = _measure(expert, loaded, data, bases, settings, grams, track)
    fields |= {
        "task": {"type": task.file.type, "labels": task.labels},
        "examples": fisher.examples,
        "tokens": sum(examples.lengths),
        "device": bases.device.type,
        "route": fisher.route,
        "sketches": projections_of(tensors[SECOND_MOMENTS]),
    }
    store.add(expert.name, fields, tensors)
    order = _label_order(expert, loaded, data)
    return EmbedOutcome(expert.name, True, fisher, [*examples.remarks(), *([order] if order else [])])


def _label_order(expert: Expert, loaded: LoadedBase, data: EncodedBatches) -> str:
    """A remark if the expert's head seems to have another order of labels, judged by some of its examples."""
    task, examples = data.task, data.examples
    if not task.type.trains_head:
        return ""
    step = -(-len(examples) // _JUDGED)
    right: list[int | Sequence[int]] = []
    chosen: list[int | Sequence[int] | None] = []
    with injected(expert, loaded) as model:
        for batch in data.batches:
            if judged := [index for index in batch if index % step == 0]:
                chosen += task.type.score(model.eval(), examples, judged).chosen
                right += [examples.classes[index] if examples.classes else data.labels[index] for index in judged]
    return label_order_remark(chosen, right, task.labels, "its training examples")


@dataclass(frozen=True)
class EncodedBatches:
    """The encoded examples of a task in batches.

    Attributes:
        labels: class of each example.
        batches: indices of the examples of each batch.
        device: device of the batches' tensors.
    """

    task: Task
    examples: Examples
    labels: Sequence[int]
    batches: Sequence[Sequence[int]]
    device: torch.device

    def plain(self, indices: Sequence[int]) -> Batch:
        """Build the batch of the given examples with the labels of the data."""
        return on_device(self.examples.batch(indices), self.device)

    def with_labels(self, model: nn.Module, settings: EmbedSettings) -> Callable[[Sequence[int]], Batch]:
        """Return the function that builds batches, with the data's labels or with labels sampled from the model."""
        if settings.labels != LabelMode.SAMPLED:
            return self.plain
        examples = self.examples
        generator = torch.Generator().manual_seed(settings.seed)
        uniform = torch.rand(len(examples), generator=generator, dtype=torch.float64)
        drawn: dict[int, Any] = {}
        for indices in self.batches:
            labels = self.task.type.draw(model, examples, indices, uniform[list(indices)])
            drawn |= zip(indices, labels, strict=True)

        def make(indices: Sequence[int]) -> Batch:
            labelled = [examples.labelled(index, drawn[index]) for index in indices]
            return on_device(examples.collate(labelled), self.device)

        return make


def _measure(
    expert: Expert,
    loaded: LoadedBase,
    data: EncodedBatches,
    bases: Bases,
    settings: EmbedSettings,
    grams: bool,
    track: Track,
) -> tuple[Fisher, dict[str, dict[str, Tensor]]]:
    """Compute the Fisher information of an expert and the tensors of its sidecar files."""
    # the batched computation is checked once per base and form of expert in a run
    form = (
        expert.base.identity,
        expert.kind,
        *((m.name, m.layer, m.bias is None) for m in expert.modules.values()),
        *((each.name, *each.slots) for each in expert.tensor_sets.values()),
    )
    nll = data.task.type.nll
    with injected(expert, loaded) as model:
        # kinds without ΔW use the layers that LoRA would adapt, so that all kinds can be compared
        layers = linear_layers(model, expert.modules or lora_targets(loaded.model))
        make = data.with_labels(model, settings)
        # hooks go on PEFT's wrapper, since the output of the base's own layer may not require a gradient
        prefix = peft_prefix(model)
        moments = SecondMoments({name: model.get_submodule(prefix + name) for name in layers}, expert.virtual_tokens)
        fisher = diagonal_fisher(
            model,
            factors_of(expert, model),
            data.batches,
            lambda indices: moments.of(make(indices)),
            nll,
            check=form not in bases.checked,
            during=moments.recording(),
            track=track,
        )
        tensors = {DIAGONAL: fisher.diagonal, SECOND_MOMENTS: moments.means() | updates_of(expert)}
        if grams:
            tensors[GRAMS] = input_grams(layers, data.batches, data.plain, partial(nll, model), track=track)
    if fisher.route == "rules":
        bases.checked.add(form)
    return fisher, tensors


def default_batch_tokens(device: torch.device, config: Any) -> int:
    """Return a number of tokens per batch that keeps a GPU busy, or whose activations fit a CPU's cache.

    >>> from types import SimpleNamespace
    >>> [default_batch_tokens(torch.device("cpu"), SimpleNamespace(hidden_size=width)) for width in (48, 384, 4096)]
    [8192, 1024, 256]
    """
    if device.type == "cuda":
        return 16_384
    width = getattr(config, "hidden_size", None)
    return min(8_192, max(256, 1_024 * 384 // width)) if isinstance(width, int) else 1_024


def factors_of(expert: Expert, model: nn.Module) -> dict[str, nn.Parameter]:
    """Map each key of the adapter's file to the model's parameter, and let only these require gradients."""
    key_of = expert.strategy.key_of_parameter
    keys = set(expert.keys)
    model.requires_grad_(False)
    found = {key_of(name): parameter for name, parameter in model.named_parameters() if key_of(name) in keys}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def updates_of(expert: Expert) -> dict[str, Tensor]:
    """Return ``update.MODULE`` → ΔW in random directions, which is stored beside the second moments."""
    return {f"{UPDATE}.{name}": update for name, update in update_embedding(expert).items()}


def projections_of(moments: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the random projections of both parts of the measure ``fisher`` as text: name → text."""
    gradients = {key: value / value.norm().clamp(min=1e-30) for key, value in _parts(moments, GRADIENT)}
    parts = {"gradients": gradients, "update": dict(_parts(moments, UPDATE))}
    return {name: to_text(project(part)) for name, part in parts.items()}


def _parts(moments: Mapping[str, Tensor], part: str) -> list[tuple[str, Tensor]]:
    return [(key, value) for key, value in moments.items() if key.startswith(f"{part}.")]
