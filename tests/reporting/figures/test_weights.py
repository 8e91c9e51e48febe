"""Learned weights by layer, and CKA against hooks on a plain model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pimerge.adapters.expert import Expert
from pimerge.adapters.writer import Coefficients
from pimerge.reporting.figures import weights
from pimerge.reporting.figures._study import ShownExamples, Study
from tests.support import looks
from tests.support.references import summed


def coefficients(study: Study) -> Coefficients:
    names = sorted(study.experts[0].modules)
    return Coefficients(
        method="learned",
        granularity="matrix",
        experts=["y", "z"],
        sha256=[expert.sha256 for expert in study.experts],
        experts_trained=False,
        weights={name: [0.1 * place, 1 - 0.1 * place] for place, name in enumerate(names)},
    )


def features(study: Study, expert: Expert, layer: str) -> np.ndarray:
    """(examples × d), example by example through the dense sum."""
    model = summed(study, [expert], [1.0])
    examples, _ = study.task.examples("test", study.task.type.load_processor(study.base.source, None), model.config)  # type: ignore[arg-type]
    seen: list[Tensor] = []

    def keep(module: object, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0]).mean(1)[0])

    model.get_submodule(layer).register_forward_hook(keep)
    for index in range(len(examples)):
        with torch.no_grad():
            model(pixel_values=examples.batch([index])["pixel_values"])
    return torch.stack(seen).double().numpy()


def cka(X: np.ndarray, Y: np.ndarray) -> float:
    """By centred Gram matrices, n × n."""
    H = np.eye(len(X)) - 1 / len(X)
    K, L = H @ X @ X.T @ H, H @ Y @ Y.T @ H
    return float((K * L).sum() / np.sqrt((K * K).sum() * (L * L).sum()))


def test_weights_and_cka(study: Study) -> None:
    known = coefficients(study)
    data = weights.FIGURE.compute((study, known))
    assert data.experts == ["y", "z"]
    assert len(data.layers) == 2
    for n in range(2):
        for layer, row in zip(data.layers, data.weights[n], strict=True):
            for module, weight in zip(data.modules, row, strict=True):
                assert weight == known.weights[f"{layer}.{module}"][n]
    layer = data.layers[1]
    own = features(study, study.target, layer)
    for expert, row in zip(study.experts, data.cka, strict=True):
        assert row[1] == pytest.approx(cka(features(study, expert, layer), own), abs=1e-5)
    looks.assert_good(weights.FIGURE, data, ["y", "z", layer])


def test_layers_are_in_the_order_of_their_numbers() -> None:
    names = ["e.10.q", "e.2.q", "head", "e.2.v"]
    assert sorted({weights._place(name)[0] for name in names}, key=weights._natural) == ["e.2", "e.10", "head"]


@pytest.mark.parametrize(("experts", "layers"), [(1, 1), (6, 24)])
def test_it_is_readable_for_many_layers_and_experts(experts: int, layers: int) -> None:
    generator = np.random.default_rng(0)
    data = weights.WeightsData(
        shown=ShownExamples(target="x", head="x", examples=5, seed=0),
        tuned=looks.LONG,
        method="learned",
        experts=looks.names(experts),
        layers=[f"a.rather.deep.model.with.long.names.layers.{place}" for place in range(layers)],
        modules=["attention.q_proj", "attention.v_proj", "mlp.fc1"],
        weights=[[[0.5, None, value] for value in generator.random(layers)] for _ in range(experts)],
        cka=[[None] * layers, *generator.random((experts - 1, layers)).tolist()],
    )
    looks.assert_good(weights.FIGURE, data)
