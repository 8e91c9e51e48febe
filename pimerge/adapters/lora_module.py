"""Low-rank updates ΔW = s·B·A of a base's matrices, as LoRA stores them.

The common layout: A is (r × d_in), B is (d_out × r) for every layer type. A convolution's kernel is flattened into
d_in; an embedding's A is (r × vocabulary). ``fan_in_fan_out`` (GPT-2's Conv1D) describes how the base stores its
weight, not the factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pimerge.adapters.keys import ATTENTION_OUTPUT, PREFIX
from pimerge.core.errors import PimergeError
from pimerge.core.patterns import matches

if TYPE_CHECKING:
    from torch import Tensor


FLATTENED = "flattened"
"""The layer of a module whose file does not tell whether it is a convolution, whose kernel is then part of d_in."""
DORA, PISSA, OLORA, KASA = "DoRA", "PiSSA", "OLoRA", "KaSA"
"""The variants of LoRA that are converted with the base's weights."""


@dataclass(frozen=True)
class BareParameter:
    """A parameter that PEFT adapts by its name (``target_parameters``) instead of by the layer that holds it.

    Attributes:
        module: the full name of the module that holds it.
        name: its name in the module.
        count: the number of matrices that it stacks; 1 for a single matrix.
        index: the place of one of them.
    """

    module: str
    name: str
    count: int
    index: int

    @property
    def full_name(self) -> str:
        """Its full name in the base model."""
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class LoraModule:
    """The update of one module: the keys of its tensors in the adapter file, and its scaling.

    Attributes:
        name: the module's full name in the base model.
        A, B, bias: keys of the tensors; ``bias`` is None without ``lora_bias``.
        scaling: s = alpha / r, or alpha / √r with rsLoRA.
        layer: ``linear``, ``embedding``, ``conv`` or :data:`FLATTENED`; for a matrix of a stacked parameter, how many
            it stacks.
        shape_A, shape_B: shapes as stored.
        magnitude: key of DoRA's magnitudes; None for other variants.
        conversions: the variants from which it has to be converted: ``PiSSA``, ``OLoRA``, ``KaSA``, ``DoRA``.
        parameter: the bare parameter or the matrix in it that is adapted; None for a layer.
        bias_factor: factor of the stored bias: scaling · bias_factor · bias is the update of the layer's bias.
    """

    is_computed: ClassVar[bool] = False
    """Whether its factors are computed from other tensors, and so cannot be compared or trained."""
    is_plain: ClassVar[bool] = True
    """Whether the tensors A and B are its factors, and not more than those."""

    name: str
    A: str
    B: str
    bias: str | None
    rank: int
    alpha: float
    scaling: float
    layer: str
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    magnitude: str | None = None
    conversions: tuple[str, ...] = ()
    parameter: BareParameter | None = None
    bias_factor: float = 1.0

    @property
    def full_rank(self) -> int:
        """Upper bound of ΔW's rank after the conversion."""
        if DORA in self.conversions:
            return min(self.d_out, self.d_in)
        return self.rank * 2 if self.conversions else self.rank

    @property
    def key_of_slot(self) -> Mapping[str, str]:
        """Slot → key of each of its tensors."""
        found = {"A": self.A, "B": self.B, "bias": self.bias}
        return {slot: key for slot, key in found.items() if key}

    @property
    def form(self) -> tuple[object, ...]:
        """Properties that two modules must share to be compared entry by entry, beside rank and bias."""
        return ()

    @property
    def shared_keys(self) -> tuple[str, ...]:
        """The keys of trained tensors that several modules share."""
        return ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its tensors that are combined."""
        return tuple(self.key_of_slot.values())

    @property
    def numbers(self) -> int:
        """The number of entries of its factors, and of its bias."""
        return self.rank * (self.d_in + self.d_out) + (0 if self.bias is None else self.d_out)

    @property
    def d_in(self) -> int:
        """Input dimension of ΔW; it includes a convolution's kernel."""
        return math.prod(self.shape_A[1:])

    @property
    def d_out(self) -> int:
        """Output dimension of ΔW."""
        return self.shape_B[0]

    def factors(self, read: Callable[[str], Tensor]) -> Factors:
        """Read its factors in the common layout; ``read`` reads the tensor of a key."""
        A, B = read(self.A), read(self.B)
        return Factors(A.reshape(A.shape[0], -1), B.reshape(B.shape[0], -1), self.scaling, self.read_bias(read))

    def read_bias(self, read: Callable[[str], Tensor]) -> Tensor | None:
        """Read its bias, which the scaling multiplies; None without one."""
        if self.bias is None:
            return None
        return read(self.bias) if self.bias_factor == 1 else read(self.bias).double() * self.bias_factor


@dataclass(frozen=True)
class Factors:
    """One module's update ΔW = scaling · B A, and its bias update scaling · bias.

    Attributes:
        A: (r × d_in).
        B: (d_out × r).
        bias: (d_out) or None.
    """

    A: Tensor
    B: Tensor
    scaling: float
    bias: Tensor | None = None


def times_added(module: str) -> int:
    """How often PEFT adds a module's update to the base's weight.

    PEFT adds that of an attention's output projection twice, in training and when it merges
    (``MultiheadAttention.merge`` in ``peft/tuners/lora/layer.py``).

    >>> times_added("attention"), times_added("attention.base_layer.out_proj")
    (1, 2)
    """
    return 2 if module.endswith(ATTENTION_OUTPUT) else 1


def stored(module: LoraModule, merged: Factors) -> dict[str, Tensor]:
    """The tensors of one module as PEFT stores them: the inverse of :meth:`LoraModule.factors` at the same scaling."""
    rank = merged.A.shape[0]
    tensors = {
        module.A: merged.A.reshape(rank, *module.shape_A[1:]).contiguous(),
        module.B: merged.B.reshape(merged.B.shape[0], rank, *module.shape_B[2:]).contiguous(),
    }
    if merged.bias is not None:
        tensors[bias_key(module.name)] = merged.bias.contiguous()
    return tensors


def refuse_biased_embeddings(modules: Iterable[LoraModule], has_bias: bool) -> None:
    """Refuse an expert of these modules with biases (``lora_bias``) if one is an embedding or a bare parameter."""
    for module in modules if has_bias else ():
        if module.layer == "embedding" or module.parameter:
            what = "a bare parameter" if module.parameter else "an embedding"
            raise PimergeError(
                f"an expert has biases (lora_bias), but '{module.name}' is {what}: PEFT cannot load both at once",
                f"leave out the experts with lora_bias or those that adapt {what.partition(' ')[2]}s",
            )


def bias_key(module: str) -> str:
    """The key of a module's bias update (``lora_bias``).

    >>> bias_key("q")
    'base_model.model.q.lora_B.bias'
    """
    return f"{PREFIX}{module}.lora_B.bias"


def in_layer(module: LoraModule, layer: str) -> LoraModule:
    """The same factors under the keys that PEFT gives them in a layer of this type.

    >>> in_layer(LoraModule("q", "", "", None, 1, 1.0, 1.0, "linear", (1, 2), (2, 1)), "embedding").A
    'base_model.model.q.lora_embedding_A'
    """
    start, end = (
        (f"{PREFIX}{module.name}.lora_embedding_", "")
        if layer == "embedding"
        else (
            f"{PREFIX}{module.name}.lora_",
            ".weight",
        )
    )
    return replace(module, layer=layer, A=f"{start}A{end}", B=f"{start}B{end}")


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value for a module in ``rank_pattern`` or ``alpha_pattern``: of the first key that matches its ending.

    >>> pattern_value({"q_proj": 4}, "layers.0.q_proj", 8), pattern_value({"proj": 4}, "layers.0.q_proj", 8)
    (4, 8)
    """
    for key, value in pattern.items():
        if matches(key, module, ending=True):
            return value
    return default
