"""Samples with a known signal and embeddings with random numbers, which measures score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pimerge.adapters.expert import Expert
from pimerge.checkpoints.safetensors_file import open_tensors
from pimerge.embedding.embed_expert import updates_of
from pimerge.embedding.features import TargetFeatures
from pimerge.embedding.random_projection import DIRECTIONS
from pimerge.embedding.store_view import StoreView


def with_spread(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Positive numbers with the spread of real ones: a few are huge."""
    return torch.randn(*shape, generator=generator).mul(2).exp()


def stored(folder: Path, expert: Expert, seed: int, scale: float = 1.0) -> StoreView:
    """An expert with a random diagonal and random marginals on the disk."""
    generator = torch.Generator().manual_seed(seed)
    diagonal = {
        key: scale * with_spread(entry.shape, generator) for key, entry in expert.file.entries.items() if "lora_" in key
    }
    marginal = {}
    for name, module in expert.modules.items():
        seen = torch.randn(min(DIRECTIONS, module.d_out), 20, generator=generator)
        marginal |= {
            f"gradient.{name}": scale * seen @ seen.T,
            f"input.{name}": scale * with_spread([module.d_in], generator),
            f"output.{name}": scale * with_spread([module.d_out], generator),
        }
    marginal |= updates_of(expert)
    folder.mkdir(parents=True, exist_ok=True)
    for part, tensors in (("diagonal", diagonal), ("marginals", marginal)):
        save_file(tensors, folder / f"{part}.safetensors")
    return StoreView(
        expert, open_tensors(folder / "diagonal.safetensors"), open_tensors(folder / "marginals.safetensors")
    )


LABELS = torch.arange(30) % 3


def sample_of(signal: float, labels: Tensor = LABELS, seed: int = 0, d: int = 6) -> TargetFeatures:
    """Clusters that lie the farther apart, the stronger the signal."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), d, generator=generator, dtype=torch.float64)
    centres = torch.randn(int(labels.max()) + 1, d, generator=generator, dtype=torch.float64)
    return TargetFeatures(noise + signal * centres[labels], labels, len(centres))


def plain(measure: Any, sample: TargetFeatures) -> float:
    return float(measure.scores(sample, torch.ones(1, len(sample.labels), dtype=torch.float64)))


BASE = sample_of(0.3)
