"""Cosine of the parameters as stored; for a LoRA, of the factors A and B.

The cosine is taken over all modules together: the numbers of A, of B and of a bias of B form one long vector,
and no scaling is applied. One (BR, R⁻¹A) of the same ΔW has other numbers, so it tells something only among
experts of one init.
"""

from __future__ import annotations

from collections.abc import Sequence

from pimerge.checkpoints.safetensors_file import TensorFile
from pimerge.embedding.store_view import StoreView, rows_by_name
from pimerge.ranking.cosine import Similarity, from_vectors
from pimerge.ranking.measure import Measure, Needs


def similarity(members: Sequence[StoreView], candidates: int, pool: Sequence[int], sampled: bool = False) -> Similarity:
    """The cosines of all numbers, in [−1, 1]; no mean is subtracted."""
    return of_files([member.expert.file for member in members[: candidates + 1]], members[0].parameters)


def of_files(files: Sequence[TensorFile], keys: Sequence[str], start: TensorFile | None = None) -> Similarity:
    """The cosines of the numbers of the first file with those of each other, over some tensors.

    Args:
        start: what all were trained from; then θ − θ0 is compared, the task vector (arXiv 2212.04089).
    """
    rows = rows_by_name([*files, *([start] if start else [])], keys, TensorFile.arrays)
    return from_vectors(((name, found[:-1] - found[-1] if start else found) for name, found in rows), len(files) - 1)


MEASURE = Measure(
    name="parameters",
    summary="Cosine of the parameters as stored; for a LoRA, of the factors A and B.",
    needs=Needs.EXPERTS,
    similarity=similarity,
    threshold=-1.0,  # without a mean to compare with it cannot tell that an expert does not help
    same_basis=True,
    of_files=of_files,
)
