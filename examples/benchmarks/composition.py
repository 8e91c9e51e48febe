"""Cost of a training step over a mixture of N experts, relative to a step of one LoRA.

    python examples/benchmarks/composition.py BASE [--modules query,value] [--tokens 1024] [--length 64]

Compares one LoRA of rank 16 whose factors are trained (as ``tune --method scratch``) with N experts of rank 16 of
which only the weights are trained (as ``tune --method learned``), on the same model and batch, alternately, in one
process. A step is forward, backward and AdamW. Prints the median of the ratio over the repeats.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from pimerge.adapters.lora_module import Factors, LoraModule
from pimerge.models.loading import quiet_libraries
from pimerge.tuning.lora_layers import LoraComponent, mix_lora
from pimerge.tuning.method import Granularity
from pimerge.tuning.mixture import Mixture

RANK = 16


def main() -> None:
    """Print one line per N."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("base")
    parser.add_argument("--modules", default="query,value")
    parser.add_argument("--experts", default="4,16,64")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    quiet_libraries()
    base = AutoModelForSequenceClassification.from_pretrained(arguments.base, num_labels=4).requires_grad_(False)
    endings = tuple(arguments.modules.split(","))
    size = arguments.tokens // arguments.length
    batch = {
        "input_ids": torch.randint(5, 1000, (size, arguments.length)),
        "attention_mask": torch.ones(size, arguments.length, dtype=torch.long),
        "labels": torch.randint(0, 4, (size,)),
    }
    one = Step(base, endings, 1, train_experts=True, batch=batch)
    for count in map(int, arguments.experts.split(",")):
        many = Step(base, endings, count, train_experts=False, batch=batch)
        for step in (one, many, one, many):
            step.run()
        ratios = []
        for _ in range(arguments.repeats):
            reference = one.run()
            ratios.append(many.run() / reference)
        print(f"N={count}, rank {RANK}: {statistics.median(ratios):.3f} of a step of one LoRA", flush=True)


class Step:
    """A training step of a mixture of random experts in a copy of the base."""

    def __init__(
        self,
        base: nn.Module,
        endings: tuple[str, ...],
        count: int,
        *,
        train_experts: bool,
        batch: dict[str, torch.Tensor],
    ) -> None:
        self.model, self.batch = copy.deepcopy(base), batch
        names = [
            name for name, layer in base.named_modules() if name.endswith(endings) and isinstance(layer, nn.Linear)
        ]
        experts = [random_expert(str(index), base, names) for index in range(count)]
        mixture = Mixture(names, [0.0] * count, Granularity.MATRIX, trained=not train_experts)
        mix_lora(self.model, experts, mixture, train_experts)
        for parameter in self.model.get_submodule("classifier").parameters():
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def run(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def random_expert(name: str, base: nn.Module, names: list[str]) -> LoraComponent:
    """An expert of rank 16 with random factors."""
    layouts, factors = {}, {}
    for module in names:
        d_out, d_in = base.get_submodule(module).weight.shape  # type: ignore[union-attr, misc]
        layouts[module] = LoraModule(module, "", "", None, RANK, RANK, 1.0, "linear", (RANK, d_in), (d_out, RANK))
        factors[module] = Factors(torch.randn(RANK, d_in) * 0.02, torch.randn(d_out, RANK) * 0.02, 1.0)
    return LoraComponent(name, layouts, factors)


if __name__ == "__main__":
    main()
