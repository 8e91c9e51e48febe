"""RandLoRA: sums of scaled random low-rank updates that all layers share, of full rank (arXiv 2502.00987).

    ΔW = s · Σ_n B_n diag(λ_n) A diag(γ_n),   s = alpha / r

with n up to min(d_out, d_in) / r, and A on the smaller of the two sides (else ΔWᵀ). A and B are the first columns and
rows of matrices for the largest layer. They are in the file (``save_projection``), or drawn again from
``projection_prng_key``, by PEFT itself. Layout: randlora_lambda is (r × n), randlora_gamma (n × min(d_out, d_in)).
"""

from __future__ import annotations

import math
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


_SLOTS = frozenset({"randlora_lambda", "randlora_gamma"})
_HARMLESS = ("save_projection", "randlora_dropout")


class _Fields(CommonFields):
    r: int = 32
    randlora_alpha: float = 640
    projection_prng_key: int = 0
    sparse: bool = False
    very_sparse: bool = False
    fan_in_fan_out: bool = False


def parse(header: AdapterHeader) -> Parts:
    """Read the layout of an expert of this kind; see :mod:`pimerge.adapters.kind`."""
    config, shapes, layers = header.config, header.shapes, header.layers
    problems = Problems()
    config = checked_config(_Fields, config, problems, _HARMLESS)
    stored, rest = split_projections("randlora", shapes)
    keys, head = keys_by_module(config, rest, _SLOTS, "RandLoRA scales", problems)
    r, alpha = config["r"], float(config["randlora_alpha"])
    weights: Mapping[str, tuple[int, ...]] = {}
    with problems.collected():
        weights = layers(list(keys))
    d_out, d_in = (max((weight[side] for weight in weights.values()), default=0) for side in (0, 1))
    small, large = sorted((d_out, d_in))
    if stored and weights:
        check_projections(stored, shapes, {"A": (r, 1, small), "B": (large, math.ceil(small / r), r)}, problems)
    fields = {name: config[name] for name in ("projection_prng_key", "sparse", "very_sparse")}
    projections = from_file_or_drawn(stored, partial(drawn_by_peft, "RandLora", r, d_out, d_in, **fields))
    found = {}
    for name, weight in weights.items():
        bases = math.ceil(min(weight[:2]) / r)
        with problems.collected(f"module '{name}': "):
            wanted = {"randlora_lambda": (r, bases), "randlora_gamma": (bases, min(weight[:2]))}
            require_shapes(keys[name], shapes, wanted)
            build = partial(_build, keys[name], weight, projections)
            found[name] = relative(name, weight, r * bases, alpha, alpha / r, keys[name], shapes, build)
    problems.raise_any("this RandLoRA cannot be used")
    return found, head


def _build(
    slots: Mapping[str, str], weight: tuple[int, ...], projections: Projections, read: Read
) -> tuple[Tensor, Tensor]:
    A, B = projections(read)
    scale, gamma = (read(slots[f"randlora_{name}"]).double() for name in ("lambda", "gamma"))
    bases, small = gamma.shape
    inner = (scale[:, :, None] * A[:, :, :small].double() * gamma).flatten(0, 1)  # (r·n × the smaller side)
    # PEFT counts the columns by base first, and the rows above by rank first
    outer = B[: max(weight), :bases].double().flatten(1)  # (the larger side × n·r)
    return (inner, outer) if weight[1] == small else (outer.T, inner.T)


KIND = Kind(
    name="randlora",
    summary="Sums of scaled random low-rank updates that all layers share.",
    formula="ΔW = s · Σ_n B_n diag(λ_n) A diag(γ_n)",
    paper="RandLoRA (arXiv 2502.00987)",
    peft_type="RANDLORA",
    has_update=True,
    reads_base=True,
    meaning_fields=("projection_prng_key", "sparse", "very_sparse"),
    fresh_fields=fresh_fields,
    usual_places=usual_places,
    parse=parse,
    key_of_parameter=key_of_parameter,
)
