"""FourierFT: a few frequencies of ΔW's two-dimensional Fourier transform (arXiv 2405.03003).

    ΔW_jk = s/(mn) · Σ_i c_i cos 2π(p_i j/m + q_i k/n)      (m × n)

Each frequency adds at most 2 to the rank, by cos(a + b) = cos a cos b − sin a sin b. Where (p_i, q_i) lie is drawn from
``random_loc_seed``; every layer of one shape has the same. Layout: fourierft_spectrum holds the c_i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pimerge.adapters.kind import AdapterHeader, Kind, Parts
from pimerge.adapters.kinds._config_fields import CommonFields
from pimerge.adapters.kinds._relatives import (
    Read,
    checked_config,
    key_of_parameter,
    keys_by_module,
    relative,
    usual_places,
)
from pimerge.adapters.kinds._relatives import fresh_fields as fresh
from pimerge.core.errors import PimergeError, Problems

if TYPE_CHECKING:
    from torch import Tensor


_HARMLESS = ("n_frequency", "n_frequency_pattern")  # the spectra tell how long they are


class _Fields(CommonFields):
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False


def parse(header: AdapterHeader) -> Parts:
    """Read the layout of an expert of this kind; see :mod:`pimerge.adapters.kind`."""
    config, shapes, layers = header.config, header.shapes, header.layers
    problems = Problems()
    config = checked_config(_Fields, config, problems, _HARMLESS)
    keys, head = keys_by_module(config, shapes, {"fourierft_spectrum"}, "spectra of FourierFT", problems)
    weights: Mapping[str, tuple[int, ...]] = {}
    with problems.collected():
        weights = layers(list(keys))
    scaling, seed = float(config["scaling"]), config["random_loc_seed"]
    found = {}
    for name, weight in weights.items():
        spectrum = shapes[keys[name]["fourierft_spectrum"]]
        with problems.collected(f"module '{name}': "):
            if len(weight) != 2 or len(spectrum) != 1 or not 0 < spectrum[0] <= math.prod(weight):
                raise PimergeError(f"its spectrum is {spectrum}, the base's weight {weight}", "check the base")
            build = partial(_build, keys[name]["fourierft_spectrum"], weight, seed)
            found[name] = relative(name, weight, 2 * spectrum[0], scaling, scaling, keys[name], shapes, build)
    problems.raise_any("this FourierFT cannot be used")
    return found, head


def fresh_fields(size: int | None, modules: Sequence[str] | None) -> dict[str, Any]:
    """What PEFT's config says of a fresh expert; its size is the number of frequencies.

    >>> fresh_fields(100, None)
    {'init_weights': True, 'n_frequency': 100}
    """
    return fresh(size, modules, "n_frequency")


def _build(key: str, weight: tuple[int, ...], seed: int, read: Read) -> tuple[Tensor, Tensor]:
    import torch

    spectrum = read(key).double()
    rows, columns = weight
    drawn = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))[: len(spectrum)]
    p, q = drawn // columns, drawn % columns
    if 2 * len(spectrum) > min(rows, columns):
        dense = torch.zeros(rows, columns, dtype=torch.float64)
        dense[p, q] = spectrum
        return torch.fft.ifft2(dense).real, torch.eye(rows, dtype=torch.float64)
    # the products are reduced while they are integers, so that no angle is too large to be exact
    by_row, by_column = (
        2 * math.pi / size * (torch.arange(size)[:, None] * place % size).double()
        for size, place in ((rows, p), (columns, q))
    )
    A = torch.cat([by_column.cos(), by_column.sin()], 1).T
    B = torch.cat([by_row.cos(), -by_row.sin()], 1) * spectrum.repeat(2) / (rows * columns)
    return A, B


KIND = Kind(
    name="fourierft",
    summary="A few frequencies of ΔW's two-dimensional Fourier transform.",
    formula="ΔW = s · Re F⁻¹(c)",
    paper="FourierFT (arXiv 2405.03003)",
    peft_type="FOURIERFT",
    has_update=True,
    reads_base=True,
    meaning_fields=("random_loc_seed",),
    fresh_fields=fresh_fields,
    usual_places=usual_places,
    parse=parse,
    key_of_parameter=key_of_parameter,
)
