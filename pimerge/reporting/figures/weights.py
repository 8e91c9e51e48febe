"""Learned weights of every layer, and the CKA of the tuned model's features with the experts' (2402.15414, figs. 7, 8).

The weights are from ``tuned/coefficients.json``. The similarity is the linear CKA of the layer's outputs, averaged over
tokens, on the target's test examples (X with an expert, Y with the tuned expert in the base, columns centred):

    ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F)

in [0, 1] (Kornblith et al., 2019). If the weights are large for helpful experts, they are large where the CKA is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError, Problems
from pimerge.reporting.figure import Figure, FigureData, FigureInputs
from pimerge.reporting.figures._canvas import new_figure, short_names, shortened, subtitle, title
from pimerge.reporting.figures._study import SAMPLING, LoadedStudy, ShownExamples, Study, load_study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing
    from torch import Tensor, nn

    from pimerge.adapters.writer import Coefficients

_LAYER = re.compile(r"(.*?\.\d+)(?:\.(.*))?$")


@dataclass(frozen=True, kw_only=True)
class WeightsData(FigureData):
    """The data of the plot.

    Attributes:
        tuned: name of the folder; ``method`` is the method of ``pimerge tune``.
        layers, modules: each weight belongs to a layer and a module in it.
        weights: expert × layer × module, None if the layer does not have the module.
        cka: expert × layer, None if the layer's outputs are not available.
    """

    shown: ShownExamples
    tuned: str
    method: str
    experts: list[str]
    layers: list[str]
    modules: list[str]
    weights: list[list[list[float | None]]]
    cka: list[list[float | None]]


def open_tuned(inputs: FigureInputs) -> tuple[Study, Coefficients]:
    """Open the tuned expert as the target, the experts that it combines, and their weights."""
    from pimerge.adapters.expert import open_expert
    from pimerge.adapters.ranking_document import Reference, open_ranked
    from pimerge.adapters.selected import base_of, distinguished
    from pimerge.adapters.writer import COEFFICIENTS_FILE, Coefficients
    from pimerge.core.documents import parse_document
    from pimerge.tasks.task import open_task

    if not inputs.tuned.is_dir():
        raise PimergeError(f"there is no '{inputs.tuned}'", "run 'pimerge tune' first")
    tuned, file = open_expert(inputs.tuned, inputs.base), inputs.tuned / COEFFICIENTS_FILE
    if not file.is_file():
        raise PimergeError(
            f"'{inputs.tuned}' has no {COEFFICIENTS_FILE}: it does not combine experts",
            "run 'pimerge tune', or name another folder with --tuned",
        )
    content = parse_document(Coefficients, file)
    problems, components = Problems(), []
    for path, sha256, strength in zip(content.experts, content.sha256, content.scales, strict=True):
        with problems.collected():
            component = open_ranked(Reference(name=Path(path).name, path=path, sha256=sha256), file, inputs.base)
            components.append(component.with_strength(strength))
    problems.raise_any(f"some experts of '{file}' cannot be opened")
    return Study(tuned, open_task(tuned.folder), base_of([], tuned, inputs.base), distinguished(components)), content


def collect(source: tuple[Study, Coefficients], inputs: FigureInputs, *, limit: int, seed: int) -> WeightsData:
    """Collect the weights and the CKA of the features of the test examples.

    Args:
        source: a study with the tuned expert as the target and its components as the experts, and the weights.
    """
    from pimerge.models.injection import injected_sum

    study, coefficients = source
    places = {module: _place(module) for module in coefficients.weights}
    layers = list(dict.fromkeys(sorted((layer for layer, _ in places.values()), key=_natural)))
    modules = sorted({module for _, module in places.values()})
    known = {places[module]: row for module, row in coefficients.weights.items()}
    found = load_study(study, inputs, limit, seed, padded=False)
    features = []
    everyone = [study.target, *study.experts]
    with inputs.track("features", len(everyone) * len(found.split.labels), "examples") as advance:
        for expert in everyone:
            with injected_sum([expert], [1.0], found.loaded) as model:
                features.append(_features(model, layers, found, advance))
    own, others = features[0], features[1:]
    return WeightsData(
        shown=found.shown,
        tuned=study.target.name,
        method=coefficients.method,
        experts=[expert.name for expert in study.experts],
        layers=layers,
        modules=modules,
        weights=[
            [[known[layer, module][n] if (layer, module) in known else None for module in modules] for layer in layers]
            for n in range(len(study.experts))
        ],
        cka=[
            [linear_cka(each[layer], own[layer]) if layer in each and layer in own else None for layer in layers]
            for each in others
        ],
    )


def linear_cka(X: Tensor, Y: Tensor) -> float:
    """Compute the linear CKA of features (n × d) and (n × e), in [0, 1]; 0 if one of them is constant.

    >>> import torch
    >>> X = torch.tensor([[0.0], [1.0], [2.0]])
    >>> linear_cka(X, 5 - 2 * X)
    1.0
    """
    X, Y = (each.double() - each.double().mean(0) for each in (X, Y))
    norms = float((X.T @ X).norm() * (Y.T @ Y).norm())
    return min(1.0, float((Y.T @ X).square().sum()) / norms) if norms > 0 else 0.0


def draw(data: WeightsData) -> Drawing:
    """Draw a heat map of weights for each expert, and one of the CKA of all experts."""
    import numpy as np
    from matplotlib.colors import Normalize

    count, layers = len(data.experts), len(data.layers)
    names = short_names(data.experts, 20)
    height = max(1.6, 0.2 * layers + 0.6)
    width = max(1.5, 0.32 * len(data.modules) + 0.7)
    figure = new_figure(count * width + 0.45 * count + 4.2, height + 1.6)
    panels = figure.subplots(
        1, count + 1, width_ratios=[*[width] * count, max(1.5, 0.45 * count + 0.7)], squeeze=False
    )[0]
    weights = np.array(data.weights, float)  # None is NaN
    scale = Normalize(float(np.nanmin(weights)), float(np.nanmax(weights)))
    image: Any = None
    for place, name in enumerate(names):
        image = _heat(panels[place], weights[place], data.modules, scale)
        title(panels[place], name, 22)
    figure.colorbar(image, ax=panels[:count].tolist(), label="weight", location="bottom", aspect=40, shrink=0.8)
    cka = np.array(data.cka, float).T  # (layers × experts)
    likeness = _heat(panels[-1], cka, names, None)
    title(panels[-1], "CKA", 22)
    figure.colorbar(likeness, ax=panels[-1], label="linear CKA", location="bottom", aspect=20)
    panels[0].set_yticks(range(layers), short_names(data.layers, 36), fontsize=7.5)
    head = f"{shortened(data.tuned)}, by {data.method}: weights of its experts in each layer and module; CKA with it on"
    subtitle(figure, f"{head} {data.shown.examples} test examples")
    return figure


def _heat(axes: Axes, values: Any, columns: Sequence[str], scale: Any) -> Any:
    import numpy as np

    image = axes.imshow(np.ma.masked_invalid(values), cmap="cividis", aspect="auto", norm=scale)
    axes.set_facecolor("0.85")
    axes.set_xticks(range(len(columns)), short_names(list(columns), 24), rotation=90, fontsize=7.5)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _place(module: str) -> tuple[str, str]:
    """Split the name of a module into its layer and its name in the layer.

    >>> _place("vit.layers.0.attention.q_proj"), _place("embeddings")
    (('vit.layers.0', 'attention.q_proj'), ('embeddings', 'itself'))
    """
    match = _LAYER.match(module)
    return (match[1], match[2] or "itself") if match else (module, "itself")


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _features(model: nn.Module, layers: Sequence[str], found: LoadedStudy, advance: Any) -> dict[str, Tensor]:
    """Return layer → outputs averaged over tokens (examples × d), in the order of the examples."""
    import torch

    from pimerge.models.injection import peft_prefix

    task, examples = found.split.task, found.split.examples
    named, prefix = dict(model.named_modules()), peft_prefix(model)
    there = {layer: named[prefix + layer] for layer in layers if prefix + layer in named}
    order: list[int] = []
    parts: dict[str, list[Tensor]] = {layer: [] for layer in there}
    for indices in found.split.batches:
        with _outputs(there) as seen:
            if task.type.trains_head:
                task.type.score(model, examples, indices)
            else:
                reading = {"output": found.loaded.model.get_output_embeddings()}  # type: ignore[operator]
                task.type.read(model, reading, examples, indices, False)
        for layer, output in seen.items():
            if len(output) == len(indices):
                parts[layer].append(output.flatten(1, -2).mean(1) if output.dim() > 2 else output)
        order += indices
        advance(len(indices))
    back = torch.tensor(order).argsort()
    whole = {layer: torch.cat(each).float().cpu() for layer, each in parts.items() if each}
    return {layer: each[back] for layer, each in whole.items() if len(each) == len(order)}


@contextmanager
def _outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that receives each module's first output in the block."""
    import torch

    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen.setdefault(name, (output if isinstance(output, torch.Tensor) else output[0]).detach())

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


FIGURE = Figure(
    name="weights",
    summary="Learned weights of every layer, and the CKA of the tuned model's features with the experts' (2402.15414, "
    "figs. 7, 8).",
    options=SAMPLING,
    data=WeightsData,
    inputs=("tuned", "base", "device", "dtype"),
    open=open_tuned,
    collect=collect,
    draw=draw,
)
