"""Bottleneck adapters for PEFT (Houlsby et al., arXiv 1902.00751).

    y ← y + s · (U f(D y + b_D) + b_U)

after the output projections of attention and feed-forward blocks, before the residual is added; f is ReLU or GELU. U
and b_U start at zero, so that a new adapter changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

from pimerge.checkpoints.architecture import hidden_size
from pimerge.peft_methods._shared import TargetedConfig, TargetedTuner

ACTIVATIONS = {"relu": relu, "gelu": gelu}

_LLAMA = ["o_proj", "down_proj"]
_BERT = ["attention.output.dense", "output.dense"]
_BART = ["out_proj", "fc2"]
_T5 = ["o", "wo"]
TARGETS: dict[str, list[str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"), _LLAMA),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _BERT),
    **dict.fromkeys(("bart", "mbart", "marian", "m2m_100", "opt", "clip", "siglip", "blip_2_qformer"), _BART),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    "distilbert": ["out_lin", "lin2"],
    "florence2": ["out_proj", "fc2", "window_attn.proj", "channel_attn.proj"],
    "gpt2": ["c_proj"],
    "vit": ["o_proj", "fc2"],
}
"""Model type → names of the output projections of its blocks."""


@dataclass
class BottleneckConfig(TargetedConfig):
    """Size and target modules of the adapters.

    Attributes:
        target_modules: names or name endings of the modules that are followed by an adapter, or a regular expression;
            by default the output projections of attention and feed-forward blocks of the architectures in
            :data:`TARGETS`.
        exclude_modules, modules_to_save: as in PEFT's own configs.
        bottleneck_dim: d, the width of the bottleneck.
        activation: f, ``relu`` or ``gelu``.
        scale: s.
        init_weights: whether U starts at zero; False, for tests, makes it random.
    """

    method: ClassVar[str] = "BOTTLENECK"
    bottleneck_dim: int = 64
    activation: str = "relu"
    scale: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is '{self.activation}', expected {' or '.join(ACTIVATIONS)}")
        if self.bottleneck_dim < 1:
            raise ValueError(f"bottleneck_dim is {self.bottleneck_dim}, expected at least 1")


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A module followed by an adapter; if the module returns a tuple, its first element is adapted.

    Args:
        width: width of the module's output.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dim", "activation", "scale")
    active_adapters: list[str]
    set_adapter: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, width: int) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.width = width
        self.bottleneck_down: Any = nn.ModuleDict({})
        self.bottleneck_up: Any = nn.ModuleDict({})
        self.bottleneck_dim: dict[str, int] = {}
        self.activation: dict[str, str] = {}
        self.scale: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter."""
        self.bottleneck_dim[adapter_name] = config.bottleneck_dim
        self.activation[adapter_name] = config.activation
        self.scale[adapter_name] = config.scale
        self.bottleneck_down[adapter_name] = nn.Linear(self.width, config.bottleneck_dim)
        self.bottleneck_up[adapter_name] = nn.Linear(config.bottleneck_dim, self.width)
        if config.init_weights:
            nn.init.zeros_(self.bottleneck_up[adapter_name].weight)
            nn.init.zeros_(self.bottleneck_up[adapter_name].bias)
        parameter = next(self.base_layer.parameters())
        for part in (self.bottleneck_down, self.bottleneck_up):
            part[adapter_name].to(parameter.device, parameter.dtype)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the module and the active adapters."""
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        if not isinstance(output, tuple):
            return self._adapted(output)
        return (self._adapted(output[0]), *output[1:])

    def _adapted(self, y: Tensor) -> Tensor:
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                activation: Any = ACTIVATIONS[self.activation[name]]
                middle = activation(down(y.to(down.weight.dtype)))
                y = y + (self.scale[name] * up(middle)).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: an adapter is not an update of its module's weights."""
        raise NotImplementedError("a bottleneck adapter is not linear, so it cannot be merged into the base's weights")

    def unmerge(self) -> None:
        """Do nothing, since nothing is ever merged."""


class BottleneckModel(TargetedTuner):
    """A model with bottleneck adapters."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping = TARGETS

    def _new_layer(self, target: nn.Module, adapter_name: str, config: BottleneckConfig, name: str) -> nn.Module:
        return BottleneckLayer(target, adapter_name, config, output_width(target, self.model))


def output_width(module: nn.Module, model: nn.Module) -> int:
    """Width of a module's output: from its own shape, or else the model's hidden size.

    >>> output_width(nn.Linear(3, 5), nn.Module())
    5
    """
    if isinstance(module, nn.Linear):
        return module.out_features
    if type(module).__name__ == "Conv1D":
        return int(module.nf)  # type: ignore[arg-type]
    shape = getattr(module, "normalized_shape", None)
    if shape is not None:
        return int(shape[-1])
    width = hidden_size(model)
    if width is None:
        raise ValueError(f"neither {type(module).__name__} nor the model's config states the width of its output")
    return width
