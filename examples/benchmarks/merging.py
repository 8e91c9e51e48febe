"""Cost of a merge, relative to PEFT's ``add_weighted_adapter`` and to reading and writing the bytes alone.

    python examples/benchmarks/merging.py [--adapters 32] [--layers 32] [--width 4096] [--rank 16]

Random adapters in bfloat16 on q and v of every layer are saved in a temporary folder (0.5 GB by default).
Each job runs in a process of its own, from files to file: pimerge opens the adapters, merges and writes; PEFT
loads them into a model, merges and saves. A job's time does not include its imports, and its memory is the peak
above what the process held before. PEFT's base takes no memory here (its weights are one number, expanded).
PEFT's ``svd`` is dense, about half a minute and 6 GB for one module of the default width, so it and pimerge's
truncation to the adapters' rank are compared on ``--svd-modules`` of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NAMES = ("q_proj", "v_proj")
# job → the job of PEFT that it is compared with; the mathematics is the same only where the comment says so
PEERS = {
    "uniform": "cat",  # the same ΔW
    "uniform --rank 16": "svd",  # the same ΔW
    "ties --space factors": "ties",  # the same idea; PEFT divides by a count instead of using the weights
    "dare-linear --space factors": "dare_linear",  # the same, with other random numbers
    "ties": "ties",  # the cores of ΔW against separate factors
    "dare-linear": "dare_linear",
    "tsv": "",
    "knots": "",
}


def main() -> None:
    """Print a line per job, with its ratio to the comparable job measured right after it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--svd-modules", type=int, default=1)
    parser.add_argument("--only", default="", help="only these jobs, separated by commas")
    parser.add_argument("--job", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        run_job(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="merging-") as folder:
        make_pool(Path(folder), arguments)
        compare(Path(folder), arguments)


def make_pool(folder: Path, arguments: argparse.Namespace) -> None:
    """Random adapters of one init, as PEFT writes them."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    modules = module_names(arguments.layers)
    shared = {name: torch.randn(arguments.rank, arguments.width, generator=generator) for name in modules}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "r": arguments.rank,
        "lora_alpha": 2 * arguments.rank,
        "target_modules": list(NAMES),
    }
    for number in range(arguments.adapters):
        tensors = {}
        for name in modules:
            noise = torch.randn(arguments.rank, arguments.width, generator=generator)
            B = torch.randn(arguments.width, arguments.rank, generator=generator)
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = ((shared[name] + 0.5 * noise) * arguments.width**-0.5).bfloat16()
            tensors[f"{key}.lora_B.weight"] = (0.02 * B).bfloat16()
        adapter = folder / "adapters" / f"expert-{number}"
        adapter.mkdir(parents=True)
        save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
        (adapter / "adapter_config.json").write_text(json.dumps(config))


def module_names(layers: int) -> list[str]:
    """The adapted modules."""
    return [f"layers.{layer}.{name}" for layer in range(layers) for name in NAMES]


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    """Run every job and its comparable job, one after the other, once the files are in the page cache."""
    chosen = [name for name in arguments.only.split(",") if name] or list(PEERS)
    floor = measure("floor", folder, arguments)
    print(f"{'job':30} {'seconds':>8} {'MB':>7}   beside", flush=True)
    print(f"{'read and write the bytes':30} {floor['seconds']:8.2f} {floor['megabytes']:7.0f}", flush=True)
    for job in chosen:
        own = measure(job, folder, arguments)
        line = f"{job:30} {own['seconds']:8.2f} {own['megabytes']:7.0f}"
        if PEERS[job]:
            peer = measure(f"peft {PEERS[job]}", folder, arguments)
            ratio = peer["seconds"] / own["seconds"]
            line += f"   {ratio:6.1f} × faster than PEFT's {PEERS[job]}"
            line += f" ({peer['seconds']:.2f} s, {peer['megabytes']:.0f} MB)"
        print(line, flush=True)


def measure(job: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one job in a process of its own."""
    command = [sys.executable, __file__, "--job", job, "--folder", str(folder)]
    for name in ("adapters", "layers", "width", "rank", "svd_modules"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_job(arguments: argparse.Namespace) -> None:
    """One job: import, then do it once and print seconds and megabytes."""
    folder = Path(arguments.folder)
    adapters = sorted((folder / "adapters").iterdir())
    if arguments.job == "floor":
        work = read_and_write(adapters, folder / "out")
    elif arguments.job.startswith("peft "):
        work = merge_by_peft(adapters, folder / "out", arguments.job.removeprefix("peft "), arguments)
    else:
        work = merge_by_pimerge(adapters, folder / "out", arguments.job, arguments)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "megabytes": resident("VmHWM") - before}))


def resident(field: str) -> float:
    """Resident memory of this process in MB: now (VmRSS) or at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1000
    raise RuntimeError(f"no {field}")


def read_and_write(adapters: list[Path], out: Path) -> Callable[[], None]:
    """Read every file and write one of an adapter's size."""

    def work() -> None:
        data = b""
        for adapter in adapters:
            data = (adapter / "adapter_model.safetensors").read_bytes()
        out.mkdir(exist_ok=True)
        (out / "adapter_model.safetensors").write_bytes(data)

    return work


def merge_by_pimerge(adapters: list[Path], out: Path, job: str, arguments: argparse.Namespace) -> Callable[[], None]:
    """What ``pimerge merge`` does, without the hashes of its manifest."""
    import torch

    from pimerge.adapters.expert import open_expert
    from pimerge.adapters.lora_module import stored
    from pimerge.adapters.low_rank import Truncation
    from pimerge.checkpoints.safetensors_file import writing_tensors
    from pimerge.core.files import new_folder
    from pimerge.merging.method import open_method
    from pimerge.merging.preparation import prepare
    from pimerge.merging.request import EntrySpace
    from pimerge.merging.update_merge import UpdateSettings

    name, *flags = job.split()
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    rank = int(given["--rank"]) if "--rank" in given else None
    wanted = (
        set(module_names(arguments.layers)[: arguments.svd_modules]) if rank else set(module_names(arguments.layers))
    )
    method = open_method(name)
    _ = open_expert(adapters[0]).base.identity  # imports the Hub's client
    torch.linalg.eigh(torch.ones(2, 2))  # loads the linear algebra

    def work() -> None:
        experts = [open_expert(adapter) for adapter in adapters]
        merge = prepare(
            experts,
            method.weights(len(experts), None),
            method,
            UpdateSettings(
                truncation=Truncation(rank), space=EntrySpace(given.get("--space", "core")), dtype=torch.bfloat16
            ),
            selected=wanted.__contains__,
        )
        keys = [key for module in merge.names for key in (merge.layout(module).A, merge.layout(module).B)]
        with (
            new_folder(out, force=True) as folder,
            writing_tensors(folder / "adapter_model.safetensors", keys) as writer,
        ):
            for module in merge.names:
                merged = merge.module(module)
                for key, tensor in stored(merged.module, merged.factors).items():
                    writer.add(key, tensor)

    return work


def merge_by_peft(adapters: list[Path], out: Path, kind: str, arguments: argparse.Namespace) -> Callable[[], None]:
    """PEFT's way: every adapter into one model, ``add_weighted_adapter``, save."""
    import torch
    from peft import PeftModel
    from torch import nn

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config: dict[str, str] = {}
            self.layers = nn.ModuleList(nn.ModuleDict() for _ in range(arguments.layers))
            for name in module_names(arguments.layers)[: arguments.svd_modules if kind == "svd" else None]:
                layer, projection = name.split(".")[1:]
                linear = nn.Linear(1, 1, bias=False)
                linear.in_features = linear.out_features = arguments.width
                weight = torch.zeros(1, 1, dtype=torch.bfloat16).expand(arguments.width, arguments.width)
                linear.weight = nn.Parameter(weight, requires_grad=False)
                self.layers[int(layer)][projection] = linear

    def work() -> None:
        import warnings

        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(Base(), adapters[0], adapter_name=adapters[0].name)
        for adapter in adapters[1:]:
            model.load_adapter(adapter, adapter_name=adapter.name)
        names = [adapter.name for adapter in adapters]
        settings = {"svd_rank": arguments.rank} if kind == "svd" else {}
        settings |= {"density": 0.2 if kind == "ties" else 0.5} if kind in ("ties", "dare_linear") else {}
        model.add_weighted_adapter(names, [1 / len(names)] * len(names), "merged", combination_type=kind, **settings)
        model.save_pretrained(out, selected_adapters=["merged"])

    return work


if __name__ == "__main__":
    main()
