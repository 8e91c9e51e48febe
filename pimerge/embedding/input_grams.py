"""Input Grams of adapted layers, for merging by regression (RegMean, arXiv 2212.09849).

    G = (1/T) Σ_m Σ_t x_mt x_mtᵀ        over all T tokens t of all examples m; (d_in × d_in)

RegMean sums XᵀX over the examples. The mean per token differs from that by a factor per expert and layer only,
and keeps a task with long texts from outweighing one with short texts. Layout: a layer's input is (…, d_in), for text
(batch, tokens, …, d_in). Padding is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pimerge.core.progress import Track, silent
from pimerge.models.injection import peft_prefix

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.tasks.examples import Batch

# Names in transformers, for T5 and for the models derived from BART.
_CROSS_ATTENTION = {"EncDecAttention", "encoder_attn", "crossattention", "cross_attn"}
_KEYS_AND_VALUES = {"k", "v", "k_proj", "v_proj", "key", "value"}
# Modules that read text tokens in a model for images and text; all others read image patches.
_OF_WORDS = {"language_model", "text_model", "lm_head"}


def input_grams(
    layers: Mapping[str, nn.Module],
    batches: Sequence[Sequence[int]],
    make_batch: Callable[[Sequence[int]], Batch],
    forward: Callable[[Batch], object],
    *,
    track: Track = silent,
) -> dict[str, Tensor]:
    """Compute the mean of x xᵀ over all tokens that enter each layer, in one forward pass without gradients.

    Products are computed in float32 (float64 for a float64 model) and summed in float64, so that batch size and padding
    matter only up to rounding.

    Args:
        layers: name → layer, in eval mode inside the model that ``forward`` runs.
        batches: indices of the examples of each batch.
        make_batch: builds the batch of the given examples; its ``attention_mask`` (batch × tokens) marks the padding,
            and its ``decoder_attention_mask`` that of a decoder's layers.
        forward: runs the model on a batch; the result is not used.
        track: shows progress over examples.

    Returns:
        name → G, (d_in × d_in) float32, exactly symmetric, in alphabetical order; layers that no example reaches are
        absent.

    >>> layer = nn.Linear(2, 1)
    >>> xs = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[1.0, 0.0], [9.0, 9.0]]])  # (2 examples, 2 tokens, 2)
    >>> mask = torch.tensor([[1, 1], [1, 0]])  # the second example has one token
    >>> grams = input_grams({"q": layer}, [[0, 1]], lambda ids: {"x": xs[ids], "attention_mask": mask[ids]},
    ...                     lambda batch: layer(batch["x"]))
    >>> (3 * grams["q"]).tolist()  # Σ x xᵀ of (1, 2), (3, 0), (1, 0)
    [[11.0, 2.0], [2.0, 4.0]]
    """
    sums = {name: _Sum() for name in sorted(layers)}
    with torch.no_grad(), track("Gram matrices", sum(map(len, batches)), "examples") as advance:
        for indices in batches:
            batch = make_batch(indices)
            with _recording(layers, sums, batch):
                forward(batch)
            advance(len(indices))
    # each float64 sum is released as soon as its mean is computed
    means = ((name, sums.pop(name).mean()) for name in list(sums))
    return {name: mean for name, mean in means if mean is not None}


def linear_layers(model: nn.Module, modules: Iterable[str]) -> dict[str, nn.Module]:
    """Return the adapted layers that multiply their input by a matrix: Linear, and GPT-2's Conv1D.

    Embeddings and convolutions are left out, since their ΔW does not multiply vectors of d_in numbers.

    Args:
        model: PEFT's model.
        modules: names of the adapted modules in the base model.

    Returns:
        module name → the base's layer inside PEFT's wrapper.
    """
    found = {}
    prefix = peft_prefix(model)
    for name in modules:
        wrapper = model.get_submodule(prefix + name)
        layer = getattr(wrapper, "base_layer", wrapper)
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
            found[name] = layer
    return found


@dataclass
class _Sum:
    """Sum Σ x xᵀ of one layer and the number of vectors x."""

    total: Tensor | None = None
    rows: int = 0

    def add(self, x: Tensor) -> None:
        """Add the rows of x (rows × d_in)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        # Apple's GPUs have no float64
        product = (x.T @ x).to(torch.float32 if x.device.type == "mps" else torch.float64)
        self.total = product if self.total is None else self.total.add_(product)
        self.rows += len(x)

    def mean(self) -> Tensor | None:
        """Return the mean of x xᵀ; None if no x was added."""
        if self.total is None or not self.rows:
            return None
        # a matrix product may be asymmetric in the last bit
        return ((self.total + self.total.T) / (2 * self.rows)).float()


@contextmanager
def _recording(layers: Mapping[str, nn.Module], sums: Mapping[str, _Sum], batch: Batch) -> Iterator[None]:
    """Add the layers' inputs to the sums during the block; their outputs stay the same."""
    handles = [
        layer.register_forward_pre_hook(partial(_record, sums[name], real_tokens(batch, name)))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record(into: _Sum, real: Tensor | None, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    into.add(real_rows(inputs[0], real))


def real_rows(x: Tensor, real: Tensor | None) -> Tensor:
    """Return the inputs without padding: (…, d_in) → (rows × d_in)."""
    if real is not None and x.dim() > 2 and x.shape[:2] == real.shape:
        x = x[real]  # (real tokens, …, d_in)
    elif real is not None and x.dim() == 2 and len(x) == real.numel():  # some models flatten (batch, tokens)
        x = x[real.flatten()]
    return x.reshape(-1, x.shape[-1])


def real_tokens(batch: Batch, layer: str, virtual: int = 0) -> Tensor | None:
    """Return a mask of a layer's input (batch × tokens), False for padding; None without padding, as for images.

    Args:
        virtual: number of tokens that an expert puts before a text. A head may read the first of them, so they are not
            padding. In an encoder-decoder the decoder does not see them.

    >>> batch = {"attention_mask": torch.tensor([[1, 0]]), "decoder_attention_mask": torch.tensor([[1, 1, 0]])}
    >>> real_tokens(batch, "decoder.layers.0.self_attn.k_proj").tolist()
    [[True, True, False]]
    >>> real_tokens(batch, "decoder.layers.0.encoder_attn.k_proj").tolist()  # its input comes from the encoder
    [[True, False]]
    >>> real_tokens(batch, "encoder.layers.0.self_attn.k_proj", virtual=1).tolist()
    [[True, True, False]]
    """
    path = layer.split(".")
    if "pixel_values" in batch and _OF_WORDS.isdisjoint(path):
        return None
    decodes = "decoder_attention_mask" in batch and _decodes(path)
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    if mask is None or mask.dim() != 2:
        return None
    return mask.bool() if decodes else torch.cat([mask.new_ones(len(mask), virtual), mask], 1).bool()


def _decodes(path: Sequence[str]) -> bool:
    """Whether the input of a layer of an encoder-decoder is the decoder's tokens."""
    reads_encoder = not _CROSS_ATTENTION.isdisjoint(path) and path[-1] in _KEYS_AND_VALUES
    return not reads_encoder and ("decoder" in path or "lm_head" in path)
