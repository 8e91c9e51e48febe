"""Several experts inside one model, as one weighted update per layer.

A layer computes y = x (W0 + Σ_n w_n s_n B_n A_n)ᵀ + b. The experts' factors are stacked, A (R × d_in) and
B (d_out × R) with R = Σ r_n, and row r of A is scaled by w_n s_n of its expert: so N experts are one LoRA of
rank R, never N projections. Of three exact ways to compute it the one with the fewest operations is taken:

- ``stack``: y = x W0ᵀ + ((x Aᵀ) ⊙ scale) Bᵀ. Cheap for few tokens or small R.
- ``materialise``: y = x (W0 + (B ⊙ scale) A)ᵀ, with the gradient of the scale from x Aᵀ and g B.
- ``materialise-dense``: the same, with it from gᵀ x. Cheap for many tokens and large R.

Embeddings and convolutions are stacked always, as PEFT runs them: A looks up or convolves, B mixes what comes out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import conv1d, conv2d, conv3d, embedding, linear

from pimerge.adapters.base_fit import delta_shape
from pimerge.adapters.lora_module import Factors, LoraModule, refuse_biased_embeddings
from pimerge.core.errors import PimergeError, Problems

if TYPE_CHECKING:
    from torch import Tensor

GRANULARITIES = ("matrix", "layer", "role", "global")
PLANS = ("stack", "materialise", "materialise-dense")


@dataclass(frozen=True)
class LoraComponent:
    """An expert of the sum: its layout and factors by module."""

    name: str
    modules: Mapping[str, LoraModule]
    factors: Mapping[str, Factors]


class Mixture(nn.Module):
    """Weights of N experts, one vector per group of modules: the softmax of what trains.

    Args:
        modules: names of all modules that the experts adapt.
        start: N numbers whose softmax the weights start from.
        granularity: ``matrix`` (a vector per module), ``layer`` (shared within a layer), ``role`` (shared by what has
            one name in all layers) or ``global``.
        trained: whether the weights train.
    """

    sums_to_one = True

    def __init__(self, modules: Sequence[str], start: Sequence[float], granularity: str, trained: bool) -> None:
        super().__init__()
        self.group_of = group_modules(modules, granularity)
        groups = max(self.group_of.values(), default=0) + 1
        self.logits = nn.Parameter(self._start(torch.tensor(list(start)).float()).repeat(groups, 1), trained)

    def _start(self, logits: Tensor) -> Tensor:
        return logits

    def forward(self, module: str) -> Tensor:
        """The weights (N) of one module, or of each of its outputs (N × d_out)."""
        return self.logits[self.group_of[module]].softmax(0)

    def weights(self) -> dict[str, list[float]]:
        """Module → weights; the mean where each output has its own."""
        with torch.no_grad():
            found = {module: self(module) for module in sorted(self.group_of)}
        return {
            module: each.flatten(1).mean(1).tolist() if each.dim() > 1 else each.tolist()
            for module, each in found.items()
        }


class FreeMixture(Mixture):
    """The weights themselves train, and need not sum to one."""

    sums_to_one = False

    def _start(self, logits: Tensor) -> Tensor:
        return logits.softmax(0)

    def forward(self, module: str) -> Tensor:
        """The weights (N) of one module."""
        return self.logits[self.group_of[module]]


class ChannelMixture(FreeMixture):
    """Weights of every output: ΔW = Σ_n diag(ω_n) s_n B_n A_n.

    Args:
        widths: d_out of each module.
    """

    def __init__(self, widths: Mapping[str, int], start: Sequence[float], granularity: str, trained: bool) -> None:
        super().__init__(list(widths), start, granularity, trained)
        self.widths = dict(widths)
        widest = max(self.widths.values(), default=0)
        self.logits = nn.Parameter(self.logits.detach()[..., None].repeat(1, 1, widest), trained)

    def forward(self, module: str) -> Tensor:
        """The weights (N × d_out) of one module."""
        return super().forward(module)[:, : self.widths[module]]


class Switch(Mixture):
    """One expert at a time, at full weight, or none: nothing trains."""

    sums_to_one = False

    def __init__(self, modules: Sequence[str], count: int) -> None:
        super().__init__(modules, [0.0] * count, "global", trained=False)
        self.choose(None)

    def choose(self, expert: int | None) -> None:
        """Let one answer; None for the bare base."""
        with torch.no_grad():
            self.logits.zero_()
            if expert is not None:
                self.logits[:, expert] = 1.0

    def forward(self, module: str) -> Tensor:
        """The weights (N) of one module: a one, or none, and zeros."""
        return self.logits[self.group_of[module]]


class MixedLinear(nn.Module):
    """A Linear (or transformers' Conv1D) with the weighted sum of several LoRA updates.

    Args:
        layer: the base's layer, frozen.
        parts: each expert's update of this layer; None for an expert without it (its update is zero).
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
        """The base's weight: models ask their layers for its dtype."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.layer.bias  # type: ignore[return-value]

    def weighted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale of each row of A (R), the factors B (d_out × R), and the update of the bias (d_out), as they count now.

        The weights of the experts are in the scale, or where each output has its own, in B.
        """
        weights = self.mixture(self.name).to(self.A.dtype)
        if weights.dim() == 1:
            factor = weights * self.scaling
            return factor[self.owner], self.B, factor @ self.biases
        return self.scaling[self.owner], self.B * weights[self.owner].T, self.scaling @ (weights * self.biases)

    def forward(self, x: Tensor) -> Tensor:
        """The mixed layer on x (…, d_in)."""
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
        """Each expert's update as it is now, with its scaling; the inverse of the constructor.

        Weights of every output are in the factors B and the biases, already.
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
    """An Embedding, whose input is a row of the identity for each token: A (R × vocabulary) is looked up."""

    def forward(self, ids: Tensor) -> Tensor:
        """The mixed layer on ids (…), (…, d_out)."""
        output: Tensor = self.layer(ids)
        rows = embedding(ids, self.A.T, self.layer.padding_idx)  # type: ignore[arg-type]  # (…, R)
        scale, B, _ = self.weighted()
        update = linear(rows, B * scale)
        return output + (update * getattr(self.layer, "embed_scale", 1.0)).to(output.dtype)


class MixedConvolution(MixedLinear):
    """A convolution: A (R × d_in · kernel) is one of the base's stride and padding, B one of kernel 1."""

    def forward(self, x: Tensor) -> Tensor:
        """The mixed layer on x (…, channels, *places), (…, d_out, *places)."""
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
    """Replace every adapted layer of a model by its composition.

    Returns:
        module name → mixed layer, in alphabetical order.

    Raises:
        PimergeError: with each module that the model lacks, whose layer is not handled, or whose shape differs.
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
    """How a layer of the base is mixed.

    Raises:
        PimergeError: if it is not there, or none that PEFT runs a LoRA on as a sum.
    """
    if layer is None:
        raise PimergeError("is not there", "pass the base that the experts were trained on with --base")
    if type(layer) is nn.Linear or type(layer).__name__ == "Conv1D":
        return MixedLinear
    if isinstance(layer, nn.Embedding) and (type(layer) is nn.Embedding or hasattr(layer, "embed_scale")):
        return MixedEmbedding
    if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if max(layer.dilation) > 1 and max(layer.kernel_size) > 1:  # type: ignore[arg-type]
            raise PimergeError(
                f"is a {type(layer).__name__} with dilation {layer.dilation}, without which PEFT runs the factors",
                "leave the experts that adapt it out",
            )
        if layer.groups != 1:
            raise PimergeError(
                f"is a {type(layer).__name__} of {layer.groups} groups, and ΔW is one matrix",
                "leave the experts that adapt it out",
            )
        return MixedConvolution
    raise PimergeError(
        f"is a {type(layer).__name__}", "tuning composes Linear, Conv1D, Embedding and convolution layers"
    )


def group_modules(modules: Sequence[str], granularity: str) -> dict[str, int]:
    """Module → number of the group whose weights it shares.

    >>> group_modules(["enc.0.q", "enc.0.v", "enc.1.q"], "layer")
    {'enc.0.q': 0, 'enc.0.v': 0, 'enc.1.q': 1}

    Raises:
        PimergeError: for a granularity that is not known.
    """
    if granularity not in GRANULARITIES:
        raise PimergeError(f"--granularity is '{granularity}'", f"expected {', '.join(GRANULARITIES)}")
    numbers: dict[str, int] = {}
    groups = {}
    for module in sorted(modules):
        layer = re.match(r"(.*?\.\d+)(?:\.|$)", module)
        key = {
            "matrix": module,
            "layer": layer[1] if layer else module,
            "role": re.sub(r"\.\d+(?=\.|$)", "", module),
            "global": "",
        }[granularity]
        groups[module] = numbers.setdefault(key, len(numbers))
    return groups


def mixed_linear(
    x: Tensor,
    scale: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: str | None = None,
) -> Tensor:
    """x (W0 + (B ⊙ scale) A)ᵀ + b, exactly, by the cheapest plan; W0 and b are frozen.

    Args:
        x: (…, d_in).
        scale: (R), weight times scaling of each row of A.
        A: (R × d_in).
        B: (d_out × R).
        weight: (d_out × d_in).
        bias: (d_out) or None.
        plan: one of ``PLANS``; None for the cheapest.

    >>> x, A, B, W = torch.ones(1, 3), torch.ones(2, 3), torch.ones(4, 2), torch.zeros(4, 3)
    >>> mixed_linear(x, torch.tensor([1.0, 0.5]), A, B, W, None).tolist()
    [[4.5, 4.5, 4.5, 4.5]]
    """
    output: Tensor = _MixedLinear.apply(x, scale, A, B, weight, bias, plan)  # type: ignore[no-untyped-call]
    return output


def cheapest_plan(tokens: int, d_in: int, d_out: int, R: int, factors_train: bool) -> str:
    """The plan with the fewest multiplications in a forward and a backward.

    >>> cheapest_plan(64, 768, 768, 16, False), cheapest_plan(4096, 384, 384, 1024, False)
    ('stack', 'materialise-dense')
    """
    through = tokens * R * (d_in + d_out)  # all tokens through both factors
    product = R * d_in * d_out  # B A, or dW onto a factor
    costs = {
        "stack": through * (3 if factors_train else 2),
        "materialise": product + through * (2 if factors_train else 1),
        "materialise-dense": product * (3 if factors_train else 2) + tokens * d_in * d_out,
    }
    return min(PLANS, key=lambda plan: costs[plan])


class _MixedLinear(torch.autograd.Function):
    """The three plans of :func:`mixed_linear`; G is the gradient of y, H = x Aᵀ, D = G B, S = diag(scale)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, A: Tensor, B: Tensor, weight: Tensor, bias: Tensor | None, plan: str | None
    ) -> Tensor:
        tokens, (R, d_in), d_out = math.prod(x.shape[:-1]), A.shape, len(B)
        factors_train = any(ctx.needs_input_grad[2:4])
        ctx.plan = plan or cheapest_plan(tokens, d_in, d_out, R, factors_train)
        if ctx.plan == "stack":
            H = x.reshape(-1, d_in) @ A.T
            ctx.save_for_backward(x if factors_train else None, scale, A, B, weight, H)
            y = linear(x, weight, bias)
            return y + ((H * scale) @ B.T).view(y.shape)
        delta = (B * scale) @ A
        merged = weight + delta
        ctx.save_for_backward(x, scale, A, B, merged, None)
        if x.dtype in (torch.bfloat16, torch.float16):  # W0 + ΔW in 16 bits would round most of ΔW away
            return linear(x, weight, bias) + linear(x, delta)
        return linear(x, merged, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, A, B, weight, H = ctx.saved_tensors  # weight is W0 for stack, else W0 + ΔW
        G = gradients[0].reshape(-1, len(B))
        needs_x, needs_scale = ctx.needs_input_grad[:2]
        needs_factors = any(ctx.needs_input_grad[2:4])
        flat = None if x is None else x.reshape(-1, A.shape[1])
        grad_scale = grad_A = grad_B = None
        grad_x = G @ weight if needs_x else None
        if ctx.plan == "materialise-dense":
            if needs_scale or needs_factors:
                assert flat is not None
                dW = G.T @ flat  # (d_out × d_in)
                BtdW = B.T @ dW
                grad_scale = (BtdW * A).sum(1)
                if needs_factors:
                    grad_A, grad_B = scale[:, None] * BtdW, (dW @ A.T) * scale
        else:
            if H is None and (needs_scale or needs_factors):
                assert flat is not None
                H = flat @ A.T
            D = G @ B
            grad_scale = (H * D).sum(0) if needs_scale else None
            if needs_factors:
                assert flat is not None
                grad_A, grad_B = (D * scale).T @ flat, G.T @ (H * scale)
            if ctx.plan == "stack" and grad_x is not None:
                grad_x = grad_x.addmm(D * scale, A)
        if grad_x is not None:
            grad_x = grad_x.view(*gradients[0].shape[:-1], A.shape[1])
        return grad_x, grad_scale, grad_A, grad_B, None, None, None
