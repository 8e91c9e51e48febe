"""VeRA: vectors that scale random projections which all layers share (arXiv 2310.11454).

    ΔW = diag(λ_b) B diag(λ_d) A

A and B are the first columns and rows of matrices for the largest layer. They are in the file (``save_projection``), or
drawn again from ``projection_prng_key``, by PEFT itself. Layout: vera_lambda_b is (d_out), vera_lambda_d (r).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from pimerge.adapters.kind import AdapterHeader, Kind, Parts
from pimerge.adapters.kinds._config_fields import CommonFields
from pimerge.adapters.kinds._projections import (
    Projections,
    check_projections,
    drawn_by_peft,
    fresh_fields,
    from_file_or_drawn,
    split_projections,
)
from pimerge.adapters.kinds._relatives import (
    Read,
    checked_config,
    key_of_parameter,
    keys_by_module,
    relative,
    require_shapes,
    usual_places,
)
from pimerge.core.errors import Problems

if TYPE_CHECKING:
    from torch import Tensor


_SLOTS = frozenset({"vera_lambda_b", "vera_lambda_d"})
_HARMLESS = ("save_projection", "vera_dropout", "d_initial")


class _Fields(CommonFields):
    r: int = 256
    projection_prng_key: int = 0
    fan_in_fan_out: bool = False


def parse(header: AdapterHeader) -> Parts:
    """Read the layout of an expert of this kind; see :mod:`pimerge.adapters.kind`."""
    config, shapes, layers = header.config, header.shapes, header.layers
    problems = Problems()
    config = checked_config(_Fields, config, problems, _HARMLESS)
    stored, rest = split_projections("vera", shapes)
    keys, head = keys_by_module(config, rest, _SLOTS, "VeRA vectors", problems)
    rank = config["r"]
    weights: Mapping[str, tuple[int, ...]] = {}
    with problems.collected():
        weights = layers(list(keys))
    d_out, d_in = (max((weight[side] for weight in weights.values()), default=0) for side in (0, 1))
    if stored and weights:
        check_projections(stored, shapes, {"A": (rank, d_in), "B": (d_out, rank)}, problems)
    draw = partial(drawn_by_peft, "Vera", rank, d_out, d_in, projection_prng_key=config["projection_prng_key"])
    projections = from_file_or_drawn(stored, draw)
    found = {}
    for name, weight in weights.items():
        with problems.collected(f"module '{name}': "):
            require_shapes(keys[name], shapes, {"vera_lambda_b": weight[:1], "vera_lambda_d": (rank,)})
            build = partial(_build, keys[name], weight[1], projections)
            found[name] = relative(name, weight, rank, float(rank), 1.0, keys[name], shapes, build)
    problems.raise_any("this VeRA cannot be used")
    return found, head


def _build(slots: Mapping[str, str], d_in: int, projections: Projections, read: Read) -> tuple[Tensor, Tensor]:
    A, B = projections(read)
    d, b = (read(slots[f"vera_lambda_{letter}"]).double() for letter in "db")
    return d[:, None] * A[:, :d_in].double(), b[:, None] * B[: len(b)].double()


KIND = Kind(
    name="vera",
    summary="Vectors that scale random projections which all layers share.",
    formula="ΔW = diag(λ_b) B diag(λ_d) A",
    paper="VeRA (arXiv 2310.11454)",
    peft_type="VERA",
    has_update=True,
    reads_base=True,
    meaning_fields=("projection_prng_key",),
    fresh_fields=fresh_fields,
    usual_places=usual_places,
    parse=parse,
    key_of_parameter=key_of_parameter,
)
