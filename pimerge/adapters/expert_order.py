"""Tell from its tensors how an adapter of a mixture stores the updates of the mixture's experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pimerge.adapters.bare_parameter import ExpertOrder, SlicedModule, is_order_unknown, with_order
from pimerge.adapters.kind import KINDS, AdapterHeader
from pimerge.checkpoints.safetensors_file import TensorFile
from pimerge.core.errors import PimergeError

if TYPE_CHECKING:
    from torch import Tensor


def known_order(config: Mapping[str, Any], file: TensorFile, order: str | None) -> str | None:
    """The given order, or else the one that the tensors show if the config leaves it open; None if they do not.

    B starts at zero and stays there for an expert that no token of the training reached. So the columns of zeros belong
    to whole experts in the order that was used, and hardly ever in the other one.
    """
    if order is not None or not is_order_unknown(config) or not config.get("target_parameters"):
        return order
    header = AdapterHeader(
        with_order(config, ExpertOrder.RANK), {key: entry.shape for key, entry in file.entries.items()}, convert=True
    )
    try:
        parts, _ = KINDS.load("lora").parse(header)
    except PimergeError:  # reported when the expert is opened
        return None
    stacks = {part.B: part for part in parts.values() if isinstance(part, SlicedModule)}
    fitting = {ExpertOrder.RANK, ExpertOrder.EXPERT}
    for key, part in stacks.items():
        assert part.parameter is not None
        fitting &= _fitting(file.read(key), part.parameter.count, part.rank)
    return fitting.pop() if len(fitting) == 1 else None


def _fitting(B: Tensor, count: int, rank: int) -> set[ExpertOrder]:
    """The orders in which the columns of zeros of B (d_out × r·count) belong to whole experts."""
    is_zero = ~B.ne(0).any(0)
    by_rank, by_expert = is_zero.view(rank, count).T, is_zero.view(count, rank)
    orders = {ExpertOrder.RANK: by_rank, ExpertOrder.EXPERT: by_expert}
    return {order for order, columns in orders.items() if bool((columns.all(1) == columns.any(1)).all())}
