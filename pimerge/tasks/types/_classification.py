"""Classification: p(y|x) is the softmax of the logits, and y is a class index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pimerge.tasks.examples import Scored, on_device
from pimerge.tasks.types._reading import catching, read_position, text_config

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pimerge.tasks.examples import Batch, Examples

FIELDS = frozenset({"metrics"})


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits (batch × classes), in float32 or wider."""
    import torch

    output: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return output if output.dtype == torch.float64 else output.float()


def nll(model: nn.Module, batch: Batch) -> Tensor:
    """−log p(y|x) of each example, shape (batch)."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits(model, batch), batch["labels"], reduction="none")


def draw(model: nn.Module, examples: Examples, indices: Sequence[int], uniform: Tensor) -> list[int]:
    """Sample y for each example from p(·|x), by inverting its distribution function at ``uniform`` (n)."""
    import torch

    with torch.no_grad():
        answers = logits(model, on_device(examples.batch(indices), next(model.parameters()).device))
    return invert_distribution(answers, uniform)


def invert_distribution(answers: Tensor, uniform: Tensor) -> list[int]:
    """Return the class at which each row's distribution function, of logits (n × classes), passes ``uniform`` (n).

    >>> import torch
    >>> invert_distribution(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0.4, 0.6]))
    [0, 1]
    """
    import torch

    distribution = answers.double().softmax(1).cumsum(1)
    found = torch.searchsorted(distribution, uniform.to(distribution)[:, None])[:, 0]
    classes: list[int] = found.clamp(max=distribution.shape[1] - 1).tolist()
    return classes


def score(model: nn.Module, examples: Examples, indices: Sequence[int]) -> Scored:
    """Score examples: −log p(y|x), and whether the most likely class is y."""
    import torch
    from torch.nn.functional import cross_entropy

    batch = on_device(examples.batch(indices), next(model.parameters()).device)
    with torch.no_grad():
        output = logits(model, batch)
    losses, chosen = cross_entropy(output, batch["labels"], reduction="none"), output.argmax(1)
    return Scored(losses, (chosen == batch["labels"]).tolist(), chosen.tolist())


def read(
    model: nn.Module, reading: Mapping[str, nn.Module], examples: Examples, indices: Sequence[int], answers: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the input vectors of the head, and the logits if ``answers``."""
    import torch

    batch = on_device(examples.batch(indices), next(model.parameters()).device)
    with torch.no_grad(), catching(reading.values()) as seen:
        output = logits(model, batch)
    tokens, pad = batch.get("input_ids"), getattr(text_config(model), "pad_token_id", None)
    real = None if tokens is None or pad is None else tokens != pad
    return read_position(seen[0], real, causal="score" in reading), output if answers else None
