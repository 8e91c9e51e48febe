"""Ensembles of experts: p(y|x) = Σ_n w_n p_n(y|x), each expert with its own head.

On disk an ensemble is a folder of experts with ``ensemble.json``; all of them are deployed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat
from torch import nn

from pimerge.adapters.expert import Expert, open_expert
from pimerge.checkpoints.base import Base
from pimerge.core.documents import parse_document
from pimerge.core.errors import PimergeError, Problems
from pimerge.models.heads import set_head
from pimerge.models.injection import modules_restored, tensors_restored
from pimerge.models.loaded_base import LoadedBase
from pimerge.tuning.lora_layers import LoraComponent, mix_lora
from pimerge.tuning.mixture import Switch
from pimerge.tuning.tensor_layers import component_of, mix_tensors

if TYPE_CHECKING:
    from torch import Tensor

ENSEMBLE_FILE = "ensemble.json"


class EnsembleExpert(BaseModel):
    """An expert of an ensemble: its path relative to the ensemble's folder, its hash and its weight."""

    model_config = ConfigDict(extra="forbid")

    path: str
    sha256: str
    weight: FiniteFloat


class EnsembleDocument(BaseModel):
    """The content of ``ensemble.json``; the weights sum to one."""

    model_config = ConfigDict(extra="forbid")

    members: list[EnsembleExpert]


@dataclass(frozen=True)
class Ensemble:
    """An open ensemble.

    Attributes:
        weights: weight of each expert's probabilities.
    """

    path: Path
    experts: Sequence[Expert]
    weights: Sequence[float]

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.name

    @property
    def base(self) -> Base:
        """The base of the experts."""
        return self.experts[0].base


def is_ensemble(path: str | Path) -> bool:
    """Whether a folder holds an ensemble."""
    return (Path(path) / ENSEMBLE_FILE).is_file()


def open_ensemble(path: Path, base: str | None = None) -> Ensemble:
    """Open an ensemble's experts."""
    document = parse_document(EnsembleDocument, path / ENSEMBLE_FILE, "tune it again")
    problems = Problems()
    experts = []
    for listed in document.members:
        with problems.collected():
            expert = open_expert(path / listed.path, base)
            if expert.sha256 != listed.sha256:
                raise PimergeError(f"'{expert.path}' has changed since the ensemble was written", "tune it again")
            experts.append(expert)
    problems.raise_any(f"the ensemble '{path}' is incomplete")
    return Ensemble(path, experts, [listed.weight for listed in document.members])


class EnsembleModel(nn.Module):
    """A model whose logits are the logarithm of the mean of several experts' probabilities.

    Args:
        model: the module to call, which contains all experts.
        loaded: the base in the model, with the head.
        switch: activates one expert at a time.
        heads: (expert, head) of each voter; the expert None is the bare base.
        weights: weights of the probabilities; they sum to one.
    """

    def __init__(
        self,
        model: nn.Module,
        loaded: LoadedBase,
        switch: Switch,
        heads: Sequence[tuple[int | None, Mapping[str, Tensor]]],
        weights: Sequence[float],
    ) -> None:
        super().__init__()
        self.model, self.loaded, self.switch = model, loaded, switch
        self.heads, self.weights = list(heads), list(weights)
        self.config = loaded.config

    def forward(self, **batch: Tensor) -> Any:
        """Run one forward pass per voter."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        found = []
        for (expert, head), weight in zip(self.heads, self.weights, strict=True):
            self.switch.choose(expert)
            set_head(self.loaded.model, head)
            logits = self.model(**batch).logits
            wide = torch.promote_types(logits.dtype, torch.float32)
            found.append(logits.to(wide).log_softmax(-1) + torch.tensor(weight, dtype=wide).log().item())
        return SequenceClassifierOutput(logits=torch.stack(found).logsumexp(0))


@contextmanager
def ensemble_in_base(ensemble: Ensemble, loaded: LoadedBase) -> Iterator[nn.Module]:
    """Put an ensemble into a base: yield the model in eval mode, then restore the base."""
    experts = ensemble.experts
    with tensors_restored(loaded.head_parameters()), modules_restored(loaded.model):
        switch = Switch(sorted({part for expert in experts for part in expert.parts}), len(experts))
        model = loaded.model
        if experts[0].tensor_sets:
            found = [component_of(expert, loaded) for expert in experts]
            model = mix_tensors(loaded, experts[0], found, switch, False).model
        else:
            mix_lora(
                model,
                [LoraComponent(e.name, e.modules, {name: e.factors(name) for name in e.modules}) for e in experts],
                switch,
                False,
            )
        switch.to(next(model.parameters()).device)
        heads = [(index, expert.head_tensors()) for index, expert in enumerate(experts)]
        yield EnsembleModel(model, loaded, switch, heads, ensemble.weights).eval()
