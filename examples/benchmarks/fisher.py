"""Cost of the Fisher embedding relative to an ordinary forward and backward pass, and to a loop over examples.

    python examples/benchmarks/fisher.py POOL [--examples 256] [--repeats 5] [--loop 32]

All three run over the same batches of the same experts, alternately, in one process. The ordinary pass is a training
step without its optimizer: gradients of the factors only, with the base frozen. The loop processes the first
``--loop`` examples one at a time; its ratio is per example. Prints medians of the ratios over the repeats, and the
peak memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pimerge.adapters.expert import open_expert
from pimerge.adapters.pool import find_experts
from pimerge.embedding.embed_expert import default_batch_tokens, factors_of
from pimerge.embedding.fisher import diagonal_fisher, fisher_by_loop
from pimerge.models.injection import injected
from pimerge.models.loading import Bases, quiet_libraries, resolve_device, resolve_dtype
from pimerge.tasks.examples import Batch, bucket_by_length
from pimerge.tasks.task import open_task


def main() -> None:
    """Print one line per expert, and the pool's ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loop", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    quiet_libraries()
    device = resolve_device(arguments.device)
    bases = Bases(device, resolve_dtype(arguments.dtype, device))
    totals = torch.zeros(arguments.repeats, 3, dtype=torch.float64)
    for place, path in enumerate(find_experts(arguments.pool)):
        seconds = measure(path, bases, arguments, check=place == 0)  # as embed does in a pool of one form
        totals += seconds
        fisher, loop = (seconds[:, 1:] / seconds[:, :1]).median(0).values.tolist()
        print(f"{path.name}: Fisher {fisher:.3f}, loop {loop:.3f}", flush=True)
    fisher, loop = (totals[:, 1:] / totals[:, :1]).median(0).values.tolist()
    print(f"pool: Fisher {fisher:.3f}, loop {loop:.3f} of a forward and backward over the same batches")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def measure(path: Path, bases: Bases, arguments: argparse.Namespace, check: bool) -> torch.Tensor:
    """Seconds of (ordinary, Fisher, loop) for one expert, a row per repeat."""
    expert, task, device = open_expert(path), open_task(path), bases.device
    loaded = bases.load(expert.base, task)
    examples, _ = task.examples("train", loaded.processor, loaded.config, limit=arguments.examples)
    batches = bucket_by_length(examples.lengths, arguments.batch_tokens or default_batch_tokens(device, loaded.config))
    alone = min(arguments.loop, len(examples))

    def make_batch(ids: Sequence[int]) -> Batch:
        return {name: value.to(device) for name, value in examples.batch(ids).items()}

    with injected(expert, loaded) as model:
        parameters = factors_of(expert, model)

        def ordinary() -> None:
            for parameter in parameters.values():
                parameter.grad = None
            for ids in batches:
                task.type.nll(model, make_batch(ids)).sum().backward()

        def by_rules() -> None:
            diagonal_fisher(model, parameters, batches, make_batch, task.type.nll, check=check)

        def by_loop() -> None:
            fisher_by_loop(model, parameters, (make_batch([index]) for index in range(alone)), task.type.nll)

        for run in (ordinary, by_rules, by_loop):
            run()
        rows = []
        for _ in range(arguments.repeats):
            rows.append([timed(run, device) for run in (ordinary, by_rules, by_loop)])
            rows[-1][2] *= len(examples) / alone
    return torch.tensor(rows, dtype=torch.float64)


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
