"""Rules that make a backward pass leave squared per-example gradients in ``.grad``, one rule per kind of layer.

Inside :func:`squaring` an ordinary ``loss.sum().backward()`` stores in ``.grad`` of a parameter θ the sum of squares
Σ_b (∂ log p_b/∂θ)² over the examples b of the batch, instead of Σ_b ∂ log p_b/∂θ, at about the cost of a plain
backward pass:

- Linear y = Wx + b: Σ_b (Σ_t g_bt x_btᵀ)² and Σ_b (Σ_t g_bt)²;
- an elementwise scale y = w ⊙ x, as in (IA)³ and, after the normalisation, in LayerNorm and RMSNorm:
  Σ_b (Σ_t g_bt ⊙ x_bt)²;
- an added bias, as in BitFit and LayerNorm: Σ_b (Σ_t g_bt)²;
- a prompt or prefix that is repeated for every example: Σ_b g_b².

Layout: (batch, …, d) with the examples first, or equally many consecutive rows for each example, such as DaViT's
windows of an image. g is the gradient of a layer's output; t counts positions within an example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import layer_norm, linear

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

_PRODUCT_BYTES = 8 * 2**20
Owned = dict[str, nn.Parameter]
"""Parameters of a module by their names within it."""
Rule = Callable[[Any, Owned, int], "AbstractContextManager[None]"]
"""(module, wanted parameters, number of examples in the batch) → context in which a backward pass squares."""


def covered(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Return the names of the parameters that some rule covers.

    >>> layer = nn.Linear(1, 1)
    >>> sorted(covered(layer, dict(layer.named_parameters()))), covered(nn.Conv1d(1, 1, 1), {})
    (['bias', 'weight'], set())
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {names[id(each)] for _, owned, _ in _ruled(model, parameters) for each in owned.values()}


@contextmanager
def squaring(model: nn.Module, parameters: Mapping[str, nn.Parameter], examples: int) -> Iterator[None]:
    """Let backward passes leave sums of squares in ``.grad`` of the parameters that some rule covers.

    Args:
        examples: number of examples in the batch.
    """
    with ExitStack() as stack:
        for module, owned, rule in list(_ruled(model, parameters)):
            stack.enter_context(rule(module, owned, examples))
        yield


def _ruled(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[nn.Module, Owned, Rule]]:
    """Yield modules that own some of the parameters, with their rule; a module with a patched forward has none."""
    wanted = {id(parameter) for parameter in parameters.values()}
    for module in model.modules():
        found = None if "forward" in vars(module) else _rule_for(module)
        if found is not None:
            rule, own = found
            owned = {name: parameter for name, parameter in own.items() if id(parameter) in wanted}
            if owned:
                yield module, owned, rule


def _rule_for(module: Any) -> tuple[Rule, Owned] | None:
    """Return the rule for a module and the parameters that it covers."""
    kind = type(module)
    own = dict(module.named_parameters(recurse=False))
    if kind is nn.Linear:
        return _linear, own
    if kind is nn.LayerNorm:
        return _layer_norm, own
    if (kind.__name__.endswith("RMSNorm") or kind.__name__ == "T5LayerNorm") and own.keys() == {"weight"}:
        return _rms_norm, own
    if kind.__module__ == "peft.tuners.ia3.layer" and kind.__name__ == "Linear":
        return _ia3, _of_adapter(module, "ia3_l")
    if kind.__name__ == "BitFitLayer":
        return _bitfit, _of_adapter(module, "bitfit_bias")
    if hasattr(module, "prompt_encoder") and module.active_peft_config.inference_mode:
        return _prompt, {"weight": module.prompt_encoder[module.active_adapter].embedding.weight}
    return None


def _of_adapter(module: Any, attribute: str) -> Owned:
    """Return the active adapter's parameter in one of PEFT's dictionaries; nothing for several active adapters."""
    active = [name for name in module.active_adapters if name in getattr(module, attribute)]
    return {attribute: getattr(module, attribute)[active[0]]} if len(active) == 1 and not module.merged else {}


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward during the block."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _standing_in(module: nn.Module, **stand_ins: Any) -> Iterator[None]:
    """Replace a module's parameters during the block; the instance dictionary has precedence over them."""
    vars(module).update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del vars(module)[name]


def _linear(module: nn.Linear, owned: Owned, examples: int) -> AbstractContextManager[None]:
    def forward(x: Tensor) -> Tensor:
        return _apply(_SquaringLinear, examples, x, module.weight, module.bias)

    return _forward(module, forward)


def _layer_norm(module: nn.LayerNorm, owned: Owned, examples: int) -> AbstractContextManager[None]:
    def forward(x: Tensor) -> Tensor:
        normalised = layer_norm(x, module.normalized_shape, eps=module.eps)
        return _apply(_SquaringScale, examples, normalised, module.weight, module.bias)

    return _forward(module, forward)


def _rms_norm(module: nn.Module, owned: Owned, examples: int) -> AbstractContextManager[None]:
    plain = type(module).forward
    weight = owned["weight"]

    def forward(x: Tensor) -> Tensor:
        with _standing_in(module, weight=torch.ones_like(weight, requires_grad=False)):
            normalised = plain(module, x)
        return _apply(_SquaringScale, examples, normalised, weight, None)

    return _forward(module, forward)


def _ia3(module: Any, owned: Owned, examples: int) -> AbstractContextManager[None]:
    scale = owned["ia3_l"]

    def scaled(x: Tensor) -> Tensor:
        return _apply(_SquaringScale, examples, x.to(scale.dtype), scale, None).to(x.dtype)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = module.base_layer(scaled(x) if module.is_feedforward else x, *args, **kwargs)
        return output if module.is_feedforward else scaled(output)

    return _forward(module, forward)


def _bitfit(module: Any, owned: Owned, examples: int) -> AbstractContextManager[None]:
    bias = owned["bitfit_bias"]
    axis = 1 if isinstance(module.base_layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else -1

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        with _standing_in(module.base_layer, bias=bias.detach()):
            output = module.base_layer(*args, **kwargs)
        return _apply(_SquaringBias, examples, output, bias, axis)

    return _forward(module, forward)


def _prompt(module: Any, owned: Owned, examples: int) -> AbstractContextManager[None]:
    """PEFT repeats the weight for every example in inference mode, the mode of every loaded expert."""
    return _standing_in(module.prompt_encoder[module.active_adapter].embedding, weight=_Repeatable(owned["weight"]))


class _Repeatable:
    """Stand-in for a prompt's weight with the attributes that PEFT reads before it repeats the weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.device = weight, weight.device

    def repeat(self, examples: int, *ones: int) -> Tensor:
        """(tokens × d) → (examples × tokens × d)."""
        return _apply(_SquaringRepeat, self.weight, examples)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    output: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


class _SquaringLinear(torch.autograd.Function):
    """Linear layer whose backward returns Σ_b (Σ_t g_bt x_btᵀ)² as the gradient of its weight W."""

    @staticmethod
    def forward(ctx: Any, examples: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.examples = examples
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, Tensor | None, Tensor | None]:
        (g,) = gradients  # (batch, …, d_out)
        x, weight = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            None,
            g @ weight if needs_x else None,
            _sum_of_squares(_by_example(g, ctx.examples), _by_example(x, ctx.examples)) if needs_weight else None,
            _squared_sums(g, ctx.examples) if needs_bias else None,
        )


class _SquaringScale(torch.autograd.Function):
    """w ⊙ x + b along the last axis; the gradient of w is Σ_b (Σ_t g_bt ⊙ x_bt)²."""

    @staticmethod
    def forward(ctx: Any, examples: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.examples = examples
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        scaled = x * weight.flatten()
        return scaled if bias is None else scaled + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, Tensor | None, Tensor | None]:
        (g,) = gradients
        x, weight = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            None,
            g * weight.flatten() if needs_x else None,
            _squared_sums(g * x, ctx.examples).view_as(weight) if needs_weight else None,
            _squared_sums(g, ctx.examples) if needs_bias else None,
        )


class _SquaringBias(torch.autograd.Function):
    """Bias that is already part of y; its gradient is Σ_b (Σ_t g_bt)², with the channels on ``axis``."""

    @staticmethod
    def forward(ctx: Any, examples: int, y: Tensor, bias: Tensor, axis: int) -> Tensor:
        ctx.examples, ctx.axis = examples, axis
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        (g,) = gradients
        squares = _squared_sums(g.movedim(ctx.axis, -1), ctx.examples)
        return None, g if ctx.needs_input_grad[1] else None, squares, None


class _SquaringRepeat(torch.autograd.Function):
    """Tensor repeated for each example; its gradient is Σ_b g_b²."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, examples: int) -> Tensor:
        return weight.repeat(examples, 1, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].square().sum(0), None


def _by_example(values: Tensor, examples: int) -> Tensor:
    """Reshape (rows, …, d) to (batch, positions, d), or to (batch, d) if every example has one position.

    If the examples cannot have equally many rows, the shape is unchanged; the result is then wrong, and the check
    against the loop detects that.
    """
    if len(values) % examples:
        return values
    found = values.reshape(examples, -1, values.shape[-1])
    return found[:, 0] if found.shape[1] == 1 else found


def _squared_sums(g: Tensor, examples: int) -> Tensor:
    """Compute Σ_b (Σ_t g_bt)², (d), for g (rows, …, d)."""
    g = _by_example(g, examples)
    return g.reshape(len(g), -1, g.shape[-1]).sum(1).square().sum(0)


def _sum_of_squares(g: Tensor, x: Tensor) -> Tensor:
    """Compute Σ_b (Σ_t g_bt x_btᵀ)², (d_out × d_in), for g (batch, …, d_out) and x (batch, …, d_in)."""
    if g.dim() == 2:  # one position per example: the square of a product is the product of the squares
        return g.square().T @ x.square()
    g, x = g.flatten(1, -2), x.flatten(1, -2)
    if g.shape[-1] > x.shape[-1]:  # the batched product is faster with the small dimension as its rows
        return _sum_of_squares(x, g).T
    size = g.shape[-1] * x.shape[-1]
    examples = max(1, _PRODUCT_BYTES // (size * g.element_size()))
    total = g.new_zeros(1, size)
    for start in range(0, len(g), examples):
        products = torch.bmm(g[start : start + examples].mT, x[start : start + examples])
        # Σ_b as a product with ones: faster than a reduction over the first axis
        total.addmm_(g.new_ones(1, len(products)), products.square_().flatten(1))
    return total.view(g.shape[-1], x.shape[-1])
