"""Slow, obvious computations that the fast ones are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pimerge.adapters.expert import Expert
from pimerge.embedding.features import FeatureReader
from pimerge.embedding.input_grams import input_grams
from pimerge.embedding.layer_moments import SecondMoments
from pimerge.models.loading import load_base
from pimerge.reporting.figures._study import Study
from pimerge.tasks.examples import Batch, Examples
from tests.support.bases import model_for
from tests.support.experts import dense_deltas


def what_enters(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    examples: Examples,
    nll: Callable[[Any, Batch], Tensor],
    batches: Sequence[Sequence[int]],
) -> dict[str, Tensor]:
    """The marginals and Gram matrices of some layers of PEFT's model, over batches."""
    moments = SecondMoments({name: model.get_submodule("base_model.model." + name) for name in layers})
    with moments.recording():
        for indices in batches:
            nll(model, moments.of(examples.batch(indices))).sum().backward()
    return moments.means() | input_grams(layers, batches, examples.batch, lambda batch: nll(model, batch))


def one_by_one(reader: FeatureReader) -> list[dict[str, Tensor]]:
    """Every example as a batch of its own, without padding."""
    batches = [reader.examples.batch([index]) for index in range(len(reader.examples))]
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]


def read_by_hand(model: nn.Module, kind: str, batch: dict[str, Tensor]) -> Tensor:
    """What the head of a plain transformers model reads of one example."""
    with torch.no_grad():
        if kind == "vit":
            return model.vit(**batch).last_hidden_state[0, 0]
        if kind == "bert":
            return model.bert(**batch).pooler_output[0]
        backbone = model.transformer if kind == "gpt2" else model.model
        return backbone(**batch).last_hidden_state[0, -1]


def dense_model(base: Path, experts: Sequence[Expert], weights: Sequence[float]) -> nn.Module:
    """The base with Σ w_n ΔW_n added to its weights, entry by entry."""
    model = model_for(base)
    with torch.no_grad():
        for expert, weight in zip(experts, weights, strict=True):
            for name, delta in dense_deltas(expert).items():
                layer = model.get_submodule(name)
                layer.weight += weight * (delta.T if type(layer).__name__ == "Conv1D" else delta)
    return model


def features(model: nn.Module, kind: str, reader: FeatureReader) -> Tensor:
    return torch.stack([read_by_hand(model, kind, batch) for batch in one_by_one(reader)])


def nll(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """−log p(y|x) of one example: of its class, or of its answer's tokens, picked one by one."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[0]
    labels = batch["labels"][0]
    if labels.dim() == 0:
        return -logits.log_softmax(0)[labels]
    places = [place for place, token in enumerate(labels.tolist()) if token != -100]
    behind = len(logits) - len(labels)  # vectors that were put before the text
    return -torch.stack([logits[behind + place].log_softmax(0)[labels[place]] for place in places]).sum()


ByHand = Callable[..., tuple[float, float]]


def summed(study: Study, experts: list[Expert], weights: list[float]) -> nn.Module:
    """The base with Σ w_n ΔW_n added to its weights and the head of the target's expert."""
    model = load_base(study.base, study.task, torch.device("cpu"), torch.float32).model
    state: dict[str, Tensor] = model.state_dict()
    for expert, weight in zip(experts, weights, strict=True):
        for name, delta in dense_deltas(expert).items():
            state[f"{name}.weight"] += (weight * delta).float()
    for name, tensor in study.target.head_tensors().items():
        state[name].copy_(tensor)
    return model
