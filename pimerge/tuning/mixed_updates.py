"""A weighted sum of experts that are updates ΔW."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pimerge.adapters.expert import Expert
from pimerge.adapters.head import Head
from pimerge.adapters.lora_module import Factors
from pimerge.adapters.low_rank import Truncation, weighted_bias, weighted_sum
from pimerge.adapters.merged_module import MergedModule
from pimerge.adapters.writer import Documents, Layout, write_expert
from pimerge.tuning.components import lora_components
from pimerge.tuning.lora_layers import mix_lora
from pimerge.tuning.method import TuneMethod
from pimerge.tuning.mixed_expert import Collapsed, MixedExpert
from pimerge.tuning.mixture import ChannelMixture
from pimerge.tuning.session import TuneRequest


class MixedUpdates(MixedExpert):
    """A weighted sum of updates, ΔW = Σ_n w_n ΔW_n."""

    def __init__(self, request: TuneRequest, method: TuneMethod, chosen: Sequence[Expert], examples: int) -> None:
        self.components = lora_components(method.plan, request, chosen)
        super().__init__(request, method, chosen, [component.name for component in self.components], examples)
        modules = {name: module for component in self.components for name, module in component.modules.items()}
        self.has_bias = any(module.bias for each in self.components for module in each.modules.values())
        self.parts = sorted(modules)
        self.mixture = self._mixture({name: module.d_out for name, module in modules.items()})
        self.model = request.session.loaded.model
        self.layers = mix_lora(self.model, self.components, self.mixture, self.plan.train_experts)

    def collapse(self, rank: int | None = None) -> Collapsed:
        """Sum the updates, module by module."""
        merged = self._merged_modules(Truncation(rank))
        layout = Layout([module.module for module in merged], torch.float32, self.has_bias)
        factors = [module.factors for module in merged]
        size = sum(
            part.A.numel() + part.B.numel() + (0 if part.bias is None else part.bias.numel()) for part in factors
        )
        session = self.request.session
        kind = type(session.loaded.model)
        peft_task = session.task.type.peft_task_for(session.loaded.config)
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        like = {
            "task_type": peft_task,
            "auto_mapping": None if peft_task else mapping,
            "fan_in_fan_out": any(type(layer.layer).__name__ == "Conv1D" for layer in self.layers.values()),
        }

        def write(output: Path, head: Head, documents: Documents, force: bool) -> None:
            write_expert(
                output, layout, merged, head, base=session.base, like=like, documents=lambda _: documents, force=force
            )

        return Collapsed([module.summary for module in merged], size, write)

    def _merged_modules(self, truncation: Truncation) -> list[MergedModule]:
        weights = self.mixture.weights()
        merged = []
        for name, layer in self.layers.items():
            parts = layer.parts(len(self.components))
            by_output = isinstance(self.mixture, ChannelMixture)  # then the parts contain the weights
            shares = [1.0] * len(parts) if by_output else weights[name]
            present = [(part, w) for part, w in zip(parts, shares, strict=True) if part is not None]
            factors, shares = [part for part, _ in present], [w for _, w in present]
            summed = weighted_sum(factors, shares, truncation, torch.float32)
            bias = weighted_bias(factors, shares, torch.float32) if self.has_bias else None
            collapsed = Factors(summed.factors.A.float(), summed.factors.B.float(), 1.0, bias)
            layout = next(each.modules[name] for each in self.components if name in each.modules)
            merged.append(MergedModule(layout, collapsed, summed.energy, summed.lost))
        return merged
