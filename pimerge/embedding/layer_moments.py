"""Second moments of the Fisher information of an adapted layer's weight W, by its outputs and by its inputs.

    E[g_i²] = (1/T) Σ_m Σ_t g_mti²,   E[x_j²] = (1/T) Σ_m Σ_t x_mtj²       over all T tokens t of all examples m
    E[Qᵀg gᵀQ]                                      with Q 64 random directions, see
    :func:`pimerge.embedding.random_projection.projection`

with x what enters the layer and g = ∂ log p(y|x) / ∂(its output). If g and x were independent, E[g_i²] E[x_j²]
would be the diagonal Fisher of W_ij per token (K-FAC, arXiv 1503.05671). Neither the rank, the init nor the basis
of an expert's factors is in them, so experts of any kind compare. Layout: x is (…, d_in), g is (…, d_out); of a
text (batch, tokens, …), and the padding counts as nothing.
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
    """Sums of squares of layer inputs and of output gradients, over the batches of a block.

    Args:
        layers: name → layer. An output that requires no gradient, since nothing before it trains, is made to.
        virtual: tokens that an expert puts before a text; they count as others do.

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
        """The batch itself; its padding is left out of what is recorded next."""
        self._batch = batch
        return batch

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Accumulate during the block; the layers' outputs do not change."""
        handles = []
        for name, layer in self._layers.items():
            handles.append(layer.register_forward_hook(self._watch(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def means(self) -> dict[str, Tensor]:
        """``input.LAYER`` → E[x²] (d_in), ``output.`` → E[g²] (d_out), ``gradient.`` → E[Qᵀg gᵀQ], in float32.

        Where gradients came back, a layer that none came back to, since no answer depends on it, has none of the three.
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
                    output = output.detach().requires_grad_().clone()  # a leaf itself may not be changed in place
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
