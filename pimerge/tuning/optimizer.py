"""AdamW for a mixture, its head and its factors, and sharpness-aware minimisation (SAM)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pimerge.tuning.mixture import Mixture
from pimerge.tuning.options import DecayTowards, TrainingOptions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer


def optimizer_of(model: nn.Module, mixture: Mixture, options: TrainingOptions) -> torch.optim.Optimizer:
    """Make AdamW; the mixture's logits have their own learning rate, and only decay towards their start."""
    others = [p for p in model.parameters() if p.requires_grad and p is not mixture.logits]
    to_start = options.decay_towards == DecayTowards.START
    decay = 0.0 if to_start else options.weight_decay
    groups: list[dict[str, Any]] = [{"params": others, "lr": options.lr, "weight_decay": decay}]
    if mixture.logits.requires_grad:
        groups.append({"params": [mixture.logits], "lr": options.weights_lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    if to_start:
        optimizer.register_step_post_hook(_towards_start(optimizer, options.weight_decay))
    return optimizer


def _towards_start(optimizer: torch.optim.Optimizer, decay: float) -> Callable[..., None]:
    """A hook for w ← w − lr · decay · (w − w0) after each step, decoupled like AdamW's decay towards 0."""
    starts = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}

    @torch.no_grad()
    def pull(*_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.lerp_(starts[parameter], group["lr"] * decay)

    return pull


@contextmanager
def at_worst(parameters: Sequence[nn.Parameter], radius: float) -> Iterator[None]:
    """Move to w + ρ g / ‖g‖₂ during a block, with cleared gradients g (SAM, arXiv 2010.01412, equation 2).

    Args:
        radius: ρ.

    >>> w = nn.Parameter(torch.zeros(2))
    >>> w.grad = torch.tensor([3.0, 4.0])
    >>> with at_worst([w], 0.5): print(w.tolist())
    [0.30000001192092896, 0.4000000059604645]
    >>> w.tolist()
    [0.0, 0.0]
    """
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    before = [parameter.detach().clone() for parameter in moved]
    with torch.no_grad():
        gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
        size = torch.stack([gradient.float().norm() for gradient in gradients]).norm()
        for parameter, gradient in zip(moved, gradients, strict=True):
            parameter.add_(gradient * (radius / (size + 1e-12)))
            parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(moved, before, strict=True):
                parameter.copy_(value)


def sharpness_aware(trainer: type[Trainer], radius: float) -> type[Trainer]:
    """Derive a Trainer with two forward and backward passes per step, the second at the worst nearby point."""

    class SharpnessAware(trainer):  # type: ignore[misc]
        def training_step(self, model: nn.Module, inputs: Any, *rest: Any, **named: Any) -> Tensor:
            loss: Tensor = super().training_step(model, dict(inputs), *rest, **named)
            with at_worst([p for p in model.parameters() if p.requires_grad], radius):
                super().training_step(model, dict(inputs), *rest, **named)
            return loss

    return SharpnessAware
