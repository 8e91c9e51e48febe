"""Second moments of an adapted layer's inputs and output gradients, from which its Fisher information follows.

    E[g_i²] = (1/T) Σ_m Σ_t g_mti²,   E[x_j²] = (1/T) Σ_m Σ_t x_mtj²       over all T tokens t of all examples m
    E[Qᵀg gᵀQ]                                      with Q 64 random directions, see
    :func:`pimerge.embedding.random_projection.projection`

with x the input of the layer and g = ∂ log p(y|x) / ∂(its output). If g and x were independent, E[g_i²] E[x_j²] would
be the diagonal Fisher information of W_ij per token (K-FAC, arXiv 1503.05671). Second moments do not depend on the
rank, init or basis of an expert's factors, so experts of any kind can be compared by them. Layout: x is (…, d_in) and g
is (…, d_out), for text (batch, tokens, …). Padding is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pimerge.embedding.input_grams import real_rows, real_tokens
from pimerge.embedding.random_projection import projection
from pimerge.embedding.store_view import GRADIENT, INPUT, OUTPUT

if TYPE_CHECKING:
    from torch import Tensor

    from pimerge.tasks.examples import Batch


class SecondMoments:
    """Sums of squares of the inputs and output gradients of layers, over all batches of a block.

    Args:
        layers: name → layer. Their outputs are made to require gradients.
        virtual: number of tokens that an expert puts before a text; they are counted like all others.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> nn.init.constant_(layer.weight, 3.0).item()
    3.0
    >>> moments = SecondMoments({"q": layer})
    >>> batch = moments.of({"x": torch.tensor([[1.0], [2.0]])})
    >>> with moments.recording():
    ...     layer(batch["x"]).square().sum().backward()
    >>> {name: value.tolist() for name, value in moments.means().items()}  # (1 + 4)/2; g = 2y: (36 + 144)/2
    {'gradient.q': [[90.0]], 'input.q': [2.5], 'output.q': [90.0]}
    """

    def __init__(self, layers: Mapping[str, nn.Module], virtual: int = 0) -> None:
        self._layers, self._virtual = layers, virtual
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._batch: Batch = {}

    def of(self, batch: Batch) -> Batch:
        """Return the batch unchanged, and ignore its padding in the next recording."""
        self._batch = batch
        return batch

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the layers during the block; their outputs stay the same."""
        handles = [layer.register_forward_hook(self._watch(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def means(self) -> dict[str, Tensor]:
        """Return ``input.LAYER`` → E[x²] (d_in), ``output.`` → E[g²] (d_out), ``gradient.`` → E[Qᵀg gᵀQ], in float32.

        After a backward pass, a layer that received no gradients, since the loss does not depend on it, is absent.
        """
        idle = {name for name in self._layers if f"{OUTPUT}.{name}" not in self._sums}
        left_out = {f"{INPUT}.{name}" for name in idle} if len(idle) < len(self._layers) else set()
        kept = sorted(self._sums.keys() - left_out)
        return {name: (self._sums[name] / self._tokens[name]).float() for name in kept}

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            real = real_tokens(self._batch, name, self._virtual)
            entering = _wide_rows(inputs[0].detach(), real)
            self._add(f"{INPUT}.{name}", entering.square().sum(0), len(entering))
            if torch.is_grad_enabled():
                if not output.requires_grad:
                    output = output.detach().requires_grad_().clone()  # a leaf cannot be changed in place
                output.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: self._add_gradient(name, _wide_rows(gradient, real))
                )
            return output

        return hook

    def _add_gradient(self, name: str, rows: Tensor) -> None:
        self._add(f"{OUTPUT}.{name}", rows.square().sum(0), len(rows))
        seen = rows @ projection(f"{name}.{OUTPUT}", rows.shape[1]).to(rows)
        self._add(f"{GRADIENT}.{name}", seen.T @ seen, len(rows))

    def _add(self, key: str, total: Tensor, tokens: int) -> None:
        # Apple's GPUs have no float64
        total = total if total.device.type == "mps" else total.double()
        self._sums[key] = self._sums[key] + total if key in self._sums else total
        self._tokens[key] = self._tokens.get(key, 0) + tokens


def _wide_rows(values: Tensor, real: Tensor | None) -> Tensor:
    rows = real_rows(values, real)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
