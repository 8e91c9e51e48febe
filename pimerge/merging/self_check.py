"""The self-check of a merge: every expert, merged alone, must come back unchanged."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pimerge.adapters.lora_module import Factors
from pimerge.adapters.low_rank import EVERYTHING, Truncation, to_cores
from pimerge.core.errors import Problems
from pimerge.core.progress import Track, silent
from pimerge.merging.method import Space, open_method
from pimerge.merging.request import EntrySpace
from pimerge.merging.update_merge import UpdateMerge

# The relative error that a single rounding to the dtype may cause.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Verified:
    """The result of a self-check that passed.

    Attributes:
        method: the method that each expert was merged with.
        deviation: the largest ‖ΔŴ − ΔW‖ / ‖ΔW‖ of a module.
    """

    method: str
    deviation: float


def verify(merge: UpdateMerge, *, track: Track = silent) -> Verified:
    """Merge every expert alone, at weight 1, and compare ΔW module by module.

    If the method changes a single expert by definition, ``interpolated`` takes its place, so that reading, alignment
    and rounding are still checked. The rank is not truncated.
    """
    method = open_method("interpolated") if "identity" in merge.method.strategy.breaks else merge.method
    side_by_side = merge.method.space is Space.LINEAR and merge.truncation == EVERYTHING
    path = replace(
        merge, method=method, truncation=EVERYTHING if side_by_side else Truncation(energy=1.0), space=EntrySpace.CORE
    )
    problems = Problems()
    largest = 0.0
    with track("verify", len(merge.experts), "experts") as advance:
        for expert in merge.experts:
            names = [name for name in merge.names if name in expert.modules]
            alone = replace(path, experts=[expert], weights={name: [1.0] for name in names})
            for name in names:
                deviation = _deviation(merge.read(expert, name), alone.module(name).factors)
                largest = max(largest, deviation)
                if not deviation <= TOLERANCE[merge.dtype]:
                    problems.add(
                        f"module '{name}' of '{expert.name}' comes back with a deviation of {deviation:.1e}, "
                        f"expected at most {TOLERANCE[merge.dtype]:.0e}",
                        "pass --dtype float32; if the problem persists, please report it",
                    )
            advance(1)
    problems.raise_any("the merge is not written, because the self-check failed")
    return Verified(method.name, largest)


def _deviation(expected: Factors, found: Factors) -> float:
    """Return ‖found − expected‖ / ‖expected‖ without forming a dense matrix; NaN counts as infinite."""
    cores = to_cores([expected, found]).stacked()
    norm = float(cores[0].norm())
    difference = float((cores[1] - cores[0]).norm())
    deviation = difference / norm if norm else difference
    return deviation if deviation == deviation else float("inf")
