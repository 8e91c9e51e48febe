"""Capture the inputs of a model's head with hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def catching(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Capture the inputs of some modules during the block, in the order of their calls."""
    seen: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(
            lambda _, inputs, kwargs: seen.append((*inputs, *kwargs.values())[0]), with_kwargs=True
        )
        for module in modules
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def text_config(model: Any) -> Any:
    """The part of a model's config with the special tokens."""
    return model.config.get_text_config()


def read_position(states: Tensor, real: Tensor | None, *, causal: bool) -> Tensor:
    """Select the vector of each example that a head reads: (batch × tokens × d) → (batch × d).

    For a causal model's head, transformers uses the last token that is not padding; any other head reads the first
    token. Inputs without tokens, (batch × d) or (batch × d × 1 × 1), are flattened.

    Args:
        real: (batch × tokens) mask of tokens that are not padding; None without padding.

    >>> import torch
    >>> states = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> read_position(states, torch.tensor([[True, True, False]]), causal=True).item()
    2.0
    """
    import torch

    if states.dim() != 3:
        return states.flatten(1)
    if not causal:
        return states[:, 0]
    if real is None:
        return states[:, -1]
    virtual = states.shape[1] - real.shape[1]  # vectors that an expert puts before the text
    last = virtual + (real * torch.arange(real.shape[1], device=real.device)).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]
