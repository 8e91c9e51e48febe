"""Cosine of the parameters as stored; for a LoRA, of the factors A and B.

The numbers of A, B and a bias of B in all modules form one vector; no scaling is applied. The factors (BR, R⁻¹A) have
the same ΔW with other numbers, so the cosine is meaningful only among experts with the same init.
"""

from __future__ import annotations

from collections.abc import Sequence

from pimerge.checkpoints.safetensors_file import TensorFile
from pimerge.embedding.store_view import StoreView, rows_by_name
from pimerge.ranking.cosine import Similarity, from_vectors
from pimerge.ranking.measure import Measure, Needs


def similarity(members: Sequence[StoreView], candidates: int, pool: Sequence[int], sampled: bool = False) -> Similarity:
    """Compute the cosines of all numbers, in [−1, 1]; no mean is subtracted."""
    return of_files([member.expert.file for member in members[: candidates + 1]], members[0].parameters)


def of_files(files: Sequence[TensorFile], keys: Sequence[str], start: TensorFile | None = None) -> Similarity:
    """Compute the cosines of the numbers of the first file with those of each other file, over some tensors.

    Args:
        start: the file θ0 from which all were trained; then the task vectors θ − θ0 are compared (arXiv 2212.04089).
    """
    rows = rows_by_name([*files, *([start] if start else [])], keys, TensorFile.arrays)
    return from_vectors(((name, found[:-1] - found[-1] if start else found) for name, found in rows), len(files) - 1)


MEASURE = Measure(
    name="parameters",
    summary="Cosine of the parameters as stored; for a LoRA, of the factors A and B.",
    needs=Needs.EXPERTS,
    similarity=similarity,
    threshold=-1.0,  # without a mean to compare with, it cannot tell whether an expert helps
    same_basis=True,
    of_files=of_files,
)
