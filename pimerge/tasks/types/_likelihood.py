"""p(y|x) of answers in text; a prompt with several candidate answers is read once.

Layout: ``labels`` (batch × tokens) are aligned with the outputs that predict them, and −100 elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from pimerge.tasks.examples import IGNORED, Batch, on_device

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pimerge.tasks.types._text_examples import TextExamples

_FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the input."""


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits (batch × tokens × vocabulary) in the model's dtype, without positions of a prompt's vectors."""
    output: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return output[:, -batch["labels"].shape[1] :]


def nll(model: nn.Module, batch: Batch) -> Tensor:
    """−log p(y|x) of each example, summed over the tokens of its answer, shape (batch); in float32 or wider."""
    return _nll(logits(model, batch), batch["labels"])


def _nll(found: Tensor, labels: Tensor) -> Tensor:
    import torch
    from torch.nn.functional import cross_entropy

    answering = labels != IGNORED
    kept = found[answering]
    kept = kept if kept.dtype == torch.float64 else kept.float()
    losses = cross_entropy(kept, labels[answering], reduction="none")
    return losses.new_zeros(labels.shape).masked_scatter(answering, losses).sum(1)


def likelihoods(model: nn.Module, examples: TextExamples, indices: Sequence[int]) -> Tensor:
    """log p(candidate|x), (n × candidates), −inf for missing candidates of an example.

    The part before the candidates is computed once for all of them: the prompt's keys and values in a causal model,
    otherwise the outputs of the encoder and of the image tower.
    """
    import torch

    counts = torch.tensor([len(examples.tokens[index].answers) for index in indices])
    last = (counts - 1).tolist()
    with torch.no_grad():
        each = _continued if begins_behind_prompts(model, examples) else _one_by_one
        rounds = ([min(candidate, own) for own in last] for candidate in range(max(last) + 1))
        found = torch.stack([-losses.double().cpu() for losses in each(model, examples, indices, rounds)], 1)
    return found.masked_fill(torch.arange(found.shape[1]) >= counts[:, None], -math.inf)


def _one_by_one(
    model: nn.Module, examples: TextExamples, indices: Sequence[int], rounds: Iterator[Sequence[int]]
) -> Iterator[Tensor]:
    """Yield −log p of one candidate of each example, round by round."""
    device = next(model.parameters()).device
    with _read_once(model):
        for chosen in rounds:
            batch = examples.collate(
                [examples.labelled(index, one) for index, one in zip(indices, chosen, strict=True)]
            )
            yield nll(model, on_device(batch, device))


@contextmanager
def _read_once(model: nn.Module) -> Iterator[None]:
    """Run the encoder and the image tower once in the block, and reuse their outputs.

    Their input (examples and padding) must not change in the block.
    """
    base = plain(model)
    parts = [base.get_encoder()] if base.config.is_encoder_decoder else []
    parts.append(base.get_encoder("image"))
    # transformers returns the model itself if it has no such part
    before = [(part, vars(part).get("forward")) for part in parts if part is not base]
    for part, _ in before:
        part.forward = _remembering(part.forward)
    try:
        yield
    finally:
        for part, own in before:
            del part.forward  # uncovers the method of the class
            if own is not None:
                part.forward = own


def _remembering(forward: Any) -> Any:
    seen: list[Any] = []

    def first(*args: Any, **kwargs: Any) -> Any:
        if not seen:
            seen.append(forward(*args, **kwargs))
        return seen[0]

    return first


def plain(model: Any) -> Any:
    """The transformers model inside PEFT's model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def begins_behind_prompts(model: Any, examples: TextExamples) -> bool:
    """Whether prompts can be read separately from the answers, with the same result.

    They cannot if PEFT puts vectors before every text, if attention depends on more than the distance of two tokens
    (except for GPT-2, whose positions start at 0), or if a layer caches anything besides keys and values.
    """
    if examples.asked is None or getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return False
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    config = plain(model).config.get_text_config(decoder=True)
    ropes = getattr(config, "rope_parameters", None) or {}
    of_layers = [value for value in ropes.values() if isinstance(value, dict)] or [ropes]
    relative = all(rope.get("rope_type") in _FIXED_ROPES and "mrope_section" not in rope for rope in of_layers)
    chunked = getattr(config, "attention_chunk_size", None) is not None
    return (
        (relative or config.model_type == "gpt2")
        and not chunked
        and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers
        )
    )


def ask(model: nn.Module, examples: TextExamples, indices: Sequence[int]) -> tuple[Any, Tensor, Tensor]:
    """Read the prompts of some examples: return the cache, the last logits (n × vocabulary), and the prompts' mask."""
    from transformers.cache_utils import DynamicCache

    assert examples.asked is not None
    batch = on_device(examples.asked(indices), next(model.parameters()).device)
    mask = batch["attention_mask"]
    cache = DynamicCache()  # keeps all tokens; a sliding window's mask hides the others
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(**batch, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache, output.logits[:, -1], mask


def _continued(
    model: nn.Module, examples: TextExamples, indices: Sequence[int], rounds: Iterator[Sequence[int]]
) -> Iterator[Tensor]:
    """Like :func:`_one_by_one` for a causal model, which reads the prompts once."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    cache, first, mask = ask(model, examples, indices)
    for chosen in rounds:
        pairs = zip(indices, chosen, strict=True)
        labels = pad_sequence([torch.tensor(examples.tokens[i].answers[one]) for i, one in pairs], True, IGNORED)
        labels = labels.to(first.device)
        reads = labels[:, :-1]  # all but the end token; empty for an answer that is only the end token
        real = (reads != IGNORED).long()
        found = first[:, None]
        if reads.shape[1]:
            output = model(
                input_ids=reads.clamp(min=0),
                attention_mask=torch.cat([mask, real], 1),
                position_ids=mask.sum(1, keepdim=True) + torch.arange(reads.shape[1], device=mask.device),
                past_key_values=deepcopy(cache),
                use_cache=True,
            )
            found = torch.cat([found, output.logits], 1)
        yield _nll(found, labels)
