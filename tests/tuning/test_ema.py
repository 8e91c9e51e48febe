"""The moving average of what trains, against a loop by hand."""

from __future__ import annotations

import torch
from torch import nn

from pimerge.tuning.ema import PREFIX, EmaModel


def values(step: int) -> torch.Tensor:
    return torch.full((2, 3), float(step**2))


def trained(decay: float, steps: int) -> EmaModel:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(values(0))
    model = EmaModel(layer, decay).train()
    for step in range(1, steps + 1):
        with torch.no_grad():
            layer.weight.copy_(values(step))
        model.update(step)
    return model


def expected(decay: float, steps: int) -> torch.Tensor:
    average = values(0)
    for step in range(1, steps + 1):
        beta = min(decay, (1 + step) / (10 + step))
        average = beta * average + (1 - beta) * values(step)
    return average


def test_it_is_the_recursion_written_out() -> None:
    for decay in (0.0, 0.3, 0.999):
        model = trained(decay, 7)
        torch.testing.assert_close(model.eval().model.weight.detach(), expected(decay, 7))
        torch.testing.assert_close(model.train().model.weight.detach(), values(7))
        assert model.model.bias.requires_grad is False


def test_the_average_answers_in_eval_mode_alone_however_often_it_is_asked() -> None:
    model, x = trained(0.5, 4), torch.ones(1, 3)
    model.eval().eval()
    torch.testing.assert_close(model(x), (expected(0.5, 4) @ x[0] + model.model.bias)[None])
    model.train().train()
    torch.testing.assert_close(model(x), (values(4) @ x[0] + model.model.bias)[None])


def test_a_state_from_either_mode_goes_on_in_either_mode() -> None:
    for saved_in_eval in (False, True):
        for loaded_in_eval in (False, True):
            model = trained(0.5, 4).train(not saved_in_eval)
            state = model.state_dict()
            assert state.keys() == {"weight", "bias", PREFIX + "weight"}
            torch.testing.assert_close(state["weight"], values(4))
            other = trained(0.5, 1).train(not loaded_in_eval)
            other.load_state_dict(state)
            torch.testing.assert_close(other.train().model.weight.detach(), values(4))
            torch.testing.assert_close(other.eval().model.weight.detach(), expected(0.5, 4))
