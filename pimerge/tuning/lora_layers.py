"""Several LoRA experts inside one model, as one weighted update per layer.

A layer computes y = x (W0 + Σ_n w_n s_n B_n A_n)ᵀ + b. The experts' factors are stacked, A (R × d_in) and
B (d_out × R) with R = Σ r_n, and row r of A is scaled by w_n s_n of its expert. So N experts cost one LoRA of rank R,
not N projections.

Linear layers use the cheapest exact computation (:mod:`pimerge.tuning.mixed_linear`). Embeddings and convolutions
always compute stacked factors, as PEFT does: A looks up or convolves, and B mixes the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import conv1d, conv2d, conv3d, embedding, linear

from pimerge.adapters.base_fit import delta_shape
from pimerge.adapters.lora_module import Factors, LoraModule, refuse_biased_embeddings
from pimerge.core.errors import PimergeError, Problems
from pimerge.tuning.mixed_linear import mixed_linear
from pimerge.tuning.mixture import Mixture

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoraComponent:
    """An expert of a mixture: its layout and factors by module."""

    name: str
    modules: Mapping[str, LoraModule]
    factors: Mapping[str, Factors]


class MixedLinear(nn.Module):
    """A Linear (or transformers' Conv1D) with the weighted sum of several LoRA updates.

    Args:
        layer: the base's frozen layer.
        parts: each expert's update of this layer; None for an expert that does not update it.
        trained: whether the factors train.
    """

    owner: Tensor
    scaling: Tensor

    def __init__(
        self, name: str, layer: nn.Module, parts: Sequence[Factors | None], mixture: Mixture, trained: bool
    ) -> None:
        super().__init__()
        self.name, self.layer = name, layer
        self.mixture = mixture
        present = [(index, part) for index, part in enumerate(parts) if part is not None]
        weight: Tensor = layer.weight  # type: ignore[assignment]
        dtype = torch.promote_types(weight.dtype, torch.float32)  # trained and summed in float32 at least
        self.A = nn.Parameter(torch.cat([part.A for _, part in present]).to(weight.device, dtype), trained)
        self.B = nn.Parameter(torch.cat([part.B for _, part in present], 1).to(weight.device, dtype), trained)
        owner = [index for index, part in present for _ in range(len(part.A))]
        scaling = [0.0 if part is None else part.scaling for part in parts]
        self.register_buffer("owner", torch.tensor(owner, device=weight.device), persistent=False)
        self.register_buffer("scaling", torch.tensor(scaling, dtype=dtype, device=weight.device), persistent=False)
        biases = torch.zeros(len(parts), len(self.B), dtype=dtype, device=weight.device)
        for index, part in present:
            if part.bias is not None:
                biases[index] = part.bias
        self.has_bias = any(part.bias is not None for _, part in present)
        self.biases = nn.Parameter(biases, trained and self.has_bias)

    @property
    def weight(self) -> Tensor:
        """The base's weight; models read its dtype."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.layer.bias  # type: ignore[return-value]

    def weighted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Current scale of each row of A (R), factors B (d_out × R), and update of the bias (d_out).

        The scale includes the experts' weights; if each output has its own weights, B includes them instead.
        """
        weights = self.mixture(self.name).to(self.A.dtype)
        if weights.dim() == 1:
            factor = weights * self.scaling
            return factor[self.owner], self.B, factor @ self.biases
        return self.scaling[self.owner], self.B * weights[self.owner].T, self.scaling @ (weights * self.biases)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the mixed layer to x (…, d_in)."""
        scale, B, bias_update = self.weighted()
        transposed = type(self.layer).__name__ == "Conv1D"
        weight = self.weight.T if transposed else self.weight
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        bias = self.bias
        output = mixed_linear(
            x.to(dtype),
            scale.to(dtype),
            self.A.to(dtype),
            B.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
        )
        return output + bias_update.to(dtype) if self.has_bias else output

    def parts(self, count: int) -> list[Factors | None]:
        """Each expert's current update, with its scaling: the inverse of the constructor.

        Weights of individual outputs are included in the factors B and the biases.
        """
        weights = self.mixture(self.name).detach()
        found: list[Factors | None] = []
        for index in range(count):
            rows = (self.owner == index).nonzero()[:, 0]
            if len(rows) == 0:
                found.append(None)
                continue
            B, bias = self.B.detach()[:, rows], self.biases[index].detach() if self.has_bias else None
            if weights.dim() > 1:
                B, bias = B * weights[index][:, None], None if bias is None else bias * weights[index]
            scaling = float(self.scaling[index])
            found.append(Factors(self.A.detach()[rows].cpu(), B.cpu(), scaling, None if bias is None else bias.cpu()))
        return found


class MixedEmbedding(MixedLinear):
    """An Embedding: A (R × vocabulary) is looked up, since tokens are one-hot inputs."""

    def forward(self, ids: Tensor) -> Tensor:
        """Apply the mixed layer to ids: (…) → (…, d_out)."""
        output: Tensor = self.layer(ids)
        rows = embedding(ids, self.A.T, self.layer.padding_idx)  # type: ignore[arg-type]  # (…, R)
        scale, B, _ = self.weighted()
        update = linear(rows, B * scale)
        return output + (update * getattr(self.layer, "embed_scale", 1.0)).to(output.dtype)


class MixedConvolution(MixedLinear):
    """A convolution: A (R × d_in · kernel) has the base's stride and padding, B has kernel size 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the mixed layer to x: (…, channels, *places) → (…, d_out, *places)."""
        output: Tensor = self.layer(x)
        weight, layer = self.weight, self.layer
        convolve: Any = {3: conv1d, 4: conv2d, 5: conv3d}[weight.dim()]
        scale, B, bias_update = self.weighted()
        A = self.A.view(-1, *weight.shape[1:])
        kernel = (B * scale).view(*B.shape, *(1 for _ in weight.shape[2:]))
        H: Tensor = convolve(x.to(A.dtype), A, None, layer.stride, layer.padding)
        update: Tensor = convolve(H, kernel, bias_update)
        return output + update.to(output.dtype)


def mix_lora(
    model: nn.Module, components: Sequence[LoraComponent], mixture: Mixture, trained: bool
) -> dict[str, MixedLinear]:
    """Replace every adapted layer of a model by a mixed layer.

    Returns:
        module name → mixed layer, in alphabetical order.
    """
    layers = dict(model.named_modules())
    problems = Problems()
    names = sorted({name for component in components for name in component.modules})
    types: dict[str, type[MixedLinear]] = {}
    for name in names:
        layer = layers.get(name)
        with problems.collected(f"module '{name}' of the base "):
            types[name] = _mixed_type(layer)
        if layer is None or name not in types:
            continue
        shape = delta_shape(layer)
        for component in components:
            module = component.modules.get(name)
            if module is not None and (module.d_out, module.d_in) != shape:
                problems.add(
                    f"module '{name}' of '{component.name}' is {module.d_out} × {module.d_in}, the base's {shape}"
                )
    modules = [module for component in components for module in component.modules.values()]
    with problems.collected():
        refuse_biased_embeddings(modules, any(module.bias for module in modules))
    problems.raise_any("the experts do not fit the base")
    mixed = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        parts = [component.factors.get(name) for component in components]
        layer = types[name](name, layers[name], parts, mixture, trained)
        setattr(model.get_submodule(parent), child, layer)
        mixed[name] = layer
    return mixed


def _mixed_type(layer: nn.Module | None) -> type[MixedLinear]:
    """The class of mixed layer for a layer of the base."""
    if layer is None:
        raise PimergeError("does not exist", "pass the base that the experts were trained on with --base")
    if type(layer) is nn.Linear or type(layer).__name__ == "Conv1D":
        return MixedLinear
    if isinstance(layer, nn.Embedding) and (type(layer) is nn.Embedding or hasattr(layer, "embed_scale")):
        return MixedEmbedding
    if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if max(layer.dilation) > 1 and max(layer.kernel_size) > 1:  # type: ignore[arg-type]
            raise PimergeError(
                f"is a {type(layer).__name__} with dilation {layer.dilation}, which PEFT ignores with the factors",
                "leave the experts that adapt it out",
            )
        if layer.groups != 1:
            raise PimergeError(
                f"is a {type(layer).__name__} of {layer.groups} groups, and ΔW is one matrix",
                "leave the experts that adapt it out",
            )
        return MixedConvolution
    raise PimergeError(f"is a {type(layer).__name__}", "tuning mixes Linear, Conv1D, Embedding and convolution layers")
