"""Every kind's squared gradients against a loop over single examples, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pimerge.fisher import diagonal_fisher
from tests.conftest import KINDS, PROMPTS, PeftCase

COUNT = 6


def nll(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    scores = model(**inputs).logits.log_softmax(1)
    return -scores[torch.arange(len(scores)), batch["labels"]]


CASES = [(kind, base) for kind in KINDS for base in ("bert", "gpt2", "vit") if not (kind in PROMPTS and base == "vit")]


@pytest.mark.parametrize(("kind", "base"), CASES)
def test_the_fisher_of_every_kind_is_the_loops(peft_case: PeftCase, kind: str, base: str) -> None:
    model, examples, singles = peft_case(base, COUNT, torch.float64, kind=kind)
    model.double()  # PEFT keeps prompts in float32
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    reference = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for single in singles:
        found = torch.autograd.grad(nll(model, single).sum(), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                reference[name] += gradient.square() / COUNT
    fisher = diagonal_fisher(model, parameters, [[3, 0, 5], [1, 2, 4]], examples.batch, nll)
    # GPT-2 reads its answer off the last position, which it cannot know of a prompt with padding behind the text
    assert fisher.route == ("loop" if (kind, base) == ("prompt", "gpt2") else "rules"), fisher.why_loop
    assert sum(float(value.sum()) for value in reference.values()) > 0
    whole = sum(float(value.square().sum()) for value in reference.values()) ** 0.5
    for name, value in reference.items():
        difference = float((fisher.diagonal[name] - value).norm())
        assert difference < 1e-9 * float(value.norm()) + 1e-12 * whole, name
