"""Which layers LoRA adapts, and the layout of its factors in each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from pimerge.adapters.keys import PREFIX
from pimerge.adapters.lora_module import LoraModule

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EMBEDDING = re.compile(r"(^|[._])(wte|wpe|embed_tokens|\w*embeddings?)$")


class NotAdapted(Exception):
    """Why a changed parameter does not become a LoRA."""


@dataclass(frozen=True)
class ChangedModule:
    """A changed weight that becomes a LoRA.

    Attributes:
        layout: the module, with the keys and shapes of its factors of rank 1; the rank is not known yet.
        before, after: keys of the weight in the base and in the fine-tuned checkpoint.
        transposed: whether the weight is stored as (d_in × d_out).
        is_conv1d: whether that is since its layer is GPT-2's Conv1D.
    """

    layout: LoraModule
    before: str
    after: str
    transposed: bool
    is_conv1d: bool


def adapted(
    name: str, shape: tuple[int, ...], layers: Mapping[str, nn.Module] | None, before: str, after: str
) -> ChangedModule:
    """The LoRA of a parameter; raises :class:`NotAdapted` with the reason if LoRA does not adapt it.

    Args:
        name: parameter name in the loaded model.
        layers: module → layer; None for a model that transformers does not know, whose layers are told by shape.
    """
    module, _, what = name.rpartition(".")
    if what not in ("weight", "bias") and len(shape) > 2:
        raise NotAdapted("the stacked weights of a mixture's experts; LoRA adapts single layers here")
    if what != "weight":
        raise NotAdapted("a bias" if what == "bias" else "not the weight of a layer")
    if len(shape) < 2:
        raise NotAdapted("a norm or another vector")
    if layers is None:
        if _EMBEDDING.search(module):
            raise NotAdapted("probably an embedding, but the class of the model is not known")
        kind = "conv" if len(shape) > 2 else "linear"
    else:
        kind = _kind_of(module, layers)
    transposed = kind in ("conv1d", "embedding")
    d_out, d_in = (shape[1], shape[0]) if transposed else shape[:2]
    ones = (1,) * len(shape[2:])
    A, B = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    layout = LoraModule(
        module,
        f"{PREFIX}{module}.{A}",
        f"{PREFIX}{module}.{B}",
        None,
        1,
        1.0,
        1.0,
        "linear" if kind == "conv1d" else kind,
        (1, d_in, *shape[2:]),
        (d_out, 1, *ones),
    )
    return ChangedModule(layout, before, after, transposed, kind == "conv1d")


def _kind_of(module: str, layers: Mapping[str, nn.Module]) -> str:
    layer = layers.get(module)
    if layer is None:
        raise NotAdapted("it is another name of a layer that is already adapted")
    kind = type(layer).__name__
    if kind == "Conv1D":
        return "conv1d"
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, _CONVOLUTIONS):
        if layer.groups > 1:
            raise NotAdapted("a grouped convolution")
        return "conv"
    # a subclass may look up something else than the tokens that PEFT looks up, such as positions with an offset
    if type(layer) is nn.Embedding or (isinstance(layer, nn.Embedding) and kind.endswith("ScaledWordEmbedding")):
        return "embedding"
    raise NotAdapted(f"a layer that LoRA does not adapt ({kind})")
