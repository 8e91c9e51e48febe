"""AdamW for a mixture, its head and its factors; weights can decay towards their start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pimerge.tuning.mixture import Mixture
from pimerge.tuning.options import DecayTowards, TrainingOptions


def optimizer_of(model: nn.Module, mixture: Mixture, options: TrainingOptions) -> torch.optim.Optimizer:
    """AdamW; the mixture's logits have their own learning rate, and decay only towards their start."""
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
    """After each step w ← w − lr · decay · (w − w0), decoupled from the gradient, as AdamW decays towards 0."""
    starts = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}

    @torch.no_grad()
    def pull(*_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.lerp_(starts[parameter], group["lr"] * decay)

    return pull
