"""A linear layer with a low-rank update, x (W0 + (B ⊙ scale) A)ᵀ + b, computed exactly by the cheapest of three plans.

The plan with the fewest operations is used:

- ``stack``: y = x W0ᵀ + ((x Aᵀ) ⊙ scale) Bᵀ. Cheap for few tokens or small R.
- ``materialise``: y = x (W0 + (B ⊙ scale) A)ᵀ, with the gradient of the scale from x Aᵀ and g B.
- ``materialise-dense``: the same, with the gradient from gᵀ x. Cheap for many tokens and large R.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

if TYPE_CHECKING:
    from torch import Tensor

PLANS = ("stack", "materialise", "materialise-dense")


def mixed_linear(
    x: Tensor, scale: Tensor, A: Tensor, B: Tensor, weight: Tensor, bias: Tensor | None, plan: str | None = None
) -> Tensor:
    """x (W0 + (B ⊙ scale) A)ᵀ + b, exactly, by the cheapest plan; W0 and b are frozen.

    Args:
        x: (…, d_in).
        scale: (R) weight times scaling of each row of A.
        A: (R × d_in).
        B: (d_out × R).
        weight: (d_out × d_in).
        bias: (d_out) or None.
        plan: one of ``PLANS``; None uses the cheapest.

    >>> x, A, B, W = torch.ones(1, 3), torch.ones(2, 3), torch.ones(4, 2), torch.zeros(4, 3)
    >>> mixed_linear(x, torch.tensor([1.0, 0.5]), A, B, W, None).tolist()
    [[4.5, 4.5, 4.5, 4.5]]
    """
    output: Tensor = _MixedLinear.apply(x, scale, A, B, weight, bias, plan)  # type: ignore[no-untyped-call]
    return output


def cheapest_plan(tokens: int, d_in: int, d_out: int, R: int, factors_train: bool) -> str:
    """The plan with the fewest multiplications in a forward and a backward.

    >>> cheapest_plan(64, 768, 768, 16, False), cheapest_plan(4096, 384, 384, 1024, False)
    ('stack', 'materialise-dense')
    """
    through = tokens * R * (d_in + d_out)  # multiply all tokens with both factors
    product = R * d_in * d_out  # B A, or the product of dW and a factor
    costs = {
        "stack": through * (3 if factors_train else 2),
        "materialise": product + through * (2 if factors_train else 1),
        "materialise-dense": product * (3 if factors_train else 2) + tokens * d_in * d_out,
    }
    return min(PLANS, key=lambda plan: costs[plan])


class _MixedLinear(torch.autograd.Function):
    """The three plans of :func:`mixed_linear`; G is the gradient of y, H = x Aᵀ, D = G B, S = diag(scale)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, A: Tensor, B: Tensor, weight: Tensor, bias: Tensor | None, plan: str | None
    ) -> Tensor:
        tokens, (R, d_in), d_out = math.prod(x.shape[:-1]), A.shape, len(B)
        factors_train = any(ctx.needs_input_grad[2:4])
        ctx.plan = plan or cheapest_plan(tokens, d_in, d_out, R, factors_train)
        if ctx.plan == "stack":
            H = x.reshape(-1, d_in) @ A.T
            ctx.save_for_backward(x if factors_train else None, scale, A, B, weight, H)
            y = linear(x, weight, bias)
            return y + ((H * scale) @ B.T).view(y.shape)
        delta = (B * scale) @ A
        merged = weight + delta
        ctx.save_for_backward(x, scale, A, B, merged, None)
        if x.dtype in (torch.bfloat16, torch.float16):  # in 16 bits, W0 + ΔW would lose most of ΔW
            return linear(x, weight, bias) + linear(x, delta)
        return linear(x, merged, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, A, B, weight, H = ctx.saved_tensors  # weight is W0 for stack, else W0 + ΔW
        G = gradients[0].reshape(-1, len(B))
        needs_x, needs_scale = ctx.needs_input_grad[:2]
        needs_factors = any(ctx.needs_input_grad[2:4])
        flat = None if x is None else x.reshape(-1, A.shape[1])
        grad_scale = grad_A = grad_B = None
        grad_x = G @ weight if needs_x else None
        if ctx.plan == "materialise-dense":
            if needs_scale or needs_factors:
                assert flat is not None
                dW = G.T @ flat  # (d_out × d_in)
                BtdW = B.T @ dW
                grad_scale = (BtdW * A).sum(1)
                if needs_factors:
                    grad_A, grad_B = scale[:, None] * BtdW, (dW @ A.T) * scale
        else:
            if H is None and (needs_scale or needs_factors):
                assert flat is not None
                H = flat @ A.T
            D = G @ B
            grad_scale = (H * D).sum(0) if needs_scale else None
            if needs_factors:
                assert flat is not None
                grad_A, grad_B = (D * scale).T @ flat, G.T @ (H * scale)
            if ctx.plan == "stack" and grad_x is not None:
                grad_x = grad_x.addmm(D * scale, A)
        if grad_x is not None:
            grad_x = grad_x.view(*gradients[0].shape[:-1], A.shape[1])
        return grad_x, grad_scale, grad_A, grad_B, None, None, None
