"""Initialise a task head from a linear probe, fitted on the inputs of the head's last layer.

With few examples, a randomly initialised head costs most of the steps, and its first gradients damage the experts. A
probe with an L2 penalty (:func:`pimerge.models.linear_probe.fit_probe`) is optimal for the frozen features at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pimerge.models.linear_probe import PENALTY, Probe, fit_probe
from pimerge.models.loaded_base import LoadedBase, in_head
from pimerge.tasks.examples import Examples, bucket_by_length
from pimerge.tasks.task import Task
from pimerge.tuning.tensor_layers import ByLength

_TOKENS_AT_ONCE = 4096


def fit_head(loaded: LoadedBase, model: nn.Module, task: Task, examples: Examples) -> nn.Linear | None:
    """Set the last layer of a task's head to the probe of these examples.

    Args:
        model: the module to call, with ``loaded``'s head.

    Returns:
        the layer; None if there is no linear layer for the classes of whole examples, and nothing was changed.
    """
    found = class_layer(loaded, task)
    if found is None:
        return None
    vectors, labels = read_vectors(model, task, found, examples)
    put_probe(found[1], fit_probe(vectors, labels, len(task.labels), PENALTY))
    return found[1]


def class_layer(loaded: LoadedBase, task: Task) -> tuple[str, nn.Linear] | None:
    """The name and last layer of a task's head; None without a linear layer for the classes of whole examples."""
    found = [
        (name, module)
        for name, module in loaded.model.named_modules()
        if in_head(f"{name}.", loaded.head) and isinstance(module, nn.Linear) and len(module.weight) == len(task.labels)
    ]
    return None if task.of_words or not found else found[-1]


def read_vectors(
    model: nn.Module, task: Task, layer: tuple[str, nn.Linear], examples: Examples
) -> tuple[Tensor, Tensor]:
    """The inputs of the head's last layer for each example, (n × d) float64, and the classes (n).

    Args:
        model: the module to call; it is left in eval mode.
        layer: the result of :func:`class_layer`.
    """
    alike = isinstance(model, ByLength)  # it splits batches, so the hook would only see the last part
    model = model.model if isinstance(model, ByLength) else model
    model.eval()
    vectors: list[Tensor] = [torch.empty(0)] * len(examples)
    labels = torch.zeros(len(examples), dtype=torch.int64)
    for indices in bucket_by_length(examples.lengths, _TOKENS_AT_ONCE, padded=not alike):
        read, _ = task.type.read(model, dict([layer]), examples, indices, False)
        for index, vector in zip(indices, read.double().cpu(), strict=True):
            vectors[index], labels[index] = vector, int(examples.get(index)["labels"])
    return torch.stack(vectors), labels


def put_probe(layer: nn.Linear, probe: Probe) -> None:
    """Copy a probe into a layer: x W + (b − c W), where c is the probe's centre.

    A layer without a bias represents it along the centre, x (W + cᵀ (b − c W) / ‖c‖²), which is exact at x = c.

    >>> probe = Probe(torch.tensor([3.0, 4.0]).double(), torch.eye(2).double(), torch.tensor([1.0, -1.0]).double())
    >>> layers = [nn.Linear(2, 2, bias=bias) for bias in (True, False)]
    >>> for layer in layers: put_probe(layer, probe)
    >>> [layer(torch.tensor([3.0, 4.0])).tolist() for layer in layers]
    [[1.0, -1.0], [1.0, -1.0]]
    """
    rest = probe.bias - probe.centre @ probe.weights
    weights = probe.weights
    if layer.bias is None:
        weights = weights + torch.outer(probe.centre, rest) / probe.centre.square().sum()
    with torch.no_grad():
        layer.weight.copy_(weights.T)
        if layer.bias is not None:
            layer.bias.copy_(rest)
