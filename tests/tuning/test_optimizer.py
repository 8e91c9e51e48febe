"""SAM and the decay towards the start, against two passes and the formula by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pimerge.tuning.mixture import Mixture
from pimerge.tuning.optimizer import at_worst, optimizer_of, sharpness_aware
from pimerge.tuning.options import TrainingOptions


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).exp().sum()


class Plain:
    """What of the Trainer is asked for: a step that adds up gradients."""

    def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *rest: Any) -> torch.Tensor:
        loss = loss_of(model, inputs.pop("x"))
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("radius", [0.01, 0.5])
def test_the_gradient_is_that_of_the_worst_point_nearby(radius: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    model.bias.requires_grad_(False)
    before = model.weight.detach().clone()
    gradient = torch.autograd.grad(loss_of(model, x), model.weight)[0]
    worst = nn.Linear(3, 2).double()
    worst.load_state_dict({"weight": before + radius * gradient / gradient.norm(), "bias": model.bias})
    expected = torch.autograd.grad(loss_of(worst, x), worst.weight)[0]
    aware: Any = sharpness_aware(Plain, radius)  # type: ignore[arg-type]
    loss = aware().training_step(model, {"x": x}, None)
    torch.testing.assert_close(model.weight.grad, expected)
    torch.testing.assert_close(loss, loss_of(model, x).detach())
    assert torch.equal(model.weight, before)
    assert model.bias.grad is None


def test_the_radius_is_over_all_parameters_together() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    with at_worst([first, second, nn.Parameter(torch.zeros(1))], 10.0):
        assert (float(first), float(second)) == pytest.approx((6.0, 8.0))
        assert first.grad is None


def test_without_a_gradient_nothing_moves() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.zeros(2)
    with at_worst([parameter], 0.5):
        assert torch.equal(parameter, torch.ones(2))


@pytest.mark.parametrize("trained", [False, True])
def test_the_decay_towards_the_start_is_its_formula(trained: bool) -> None:
    """w ← w − lr λ (w − w0) behind each step of Adam; the weights of experts with their own learning rate."""
    torch.manual_seed(0)
    model, mixture = nn.Linear(3, 2), Mixture(["m"], [0.0, 1.0], "matrix", trained)
    both = nn.ModuleList([model, mixture])
    starts = [p.detach().clone() for p in (model.weight, model.bias, mixture.logits)]
    options = TrainingOptions(lr=0.1, weights_lr=0.2, weight_decay=0.5, decay_towards="start")
    optimizer = optimizer_of(both, mixture, options)
    copies = [nn.Parameter(start.clone()) for start in starts]
    plain = torch.optim.AdamW(
        [{"params": copies[:2], "lr": 0.1, "weight_decay": 0.0}, {"params": copies[2:], "lr": 0.2, "weight_decay": 0.0}]
    )
    for step in range(4):
        for parameter, copy in zip((model.weight, model.bias, mixture.logits), copies, strict=True):
            parameter.grad = torch.full_like(parameter, 1.0 + step)
            copy.grad = parameter.grad.clone() if parameter.requires_grad else None
        optimizer.step()
        plain.step()
        with torch.no_grad():
            for copy, start, lr in zip(copies, starts, (0.1, 0.1, 0.2), strict=True):
                copy.sub_(lr * 0.5 * (copy - start))
    for parameter, copy in zip((model.weight, model.bias, mixture.logits), copies, strict=True):
        torch.testing.assert_close(parameter.detach(), copy.detach())
    assert torch.equal(mixture.logits, starts[2]) != trained
