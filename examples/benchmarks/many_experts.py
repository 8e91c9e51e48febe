"""Cost of ``pimerge rank`` in a store of very many experts, and what its shortlist misses.

    python examples/benchmarks/many_experts.py [--experts 10000] [--parameters 1000000] [--folder FOLDER]

It builds a store of synthetic LoRA experts in families (rank 8 on layers of 768 × 768), with the functions that
``embed`` uses. Each family has ``--family`` experts with numbers of their own, from near twins of the family's core
to distant relatives. To save disk space, the experts beyond ``--distinct`` are copies, by hard links, of experts of
other families than the target's; the random projection and the hash of every entry are those of its files.

Prints seconds and peak memory of the whole command, size of the document, the parts of one comparison, the error of
the cosines of random projections, and how many of the exact best 10 are on the shortlist. With ``--folder`` the store
is kept there and used again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pimerge.adapters.expert import open_expert
from pimerge.adapters.expert_files import CONFIG, WEIGHTS
from pimerge.core.files import json_text, sha256_file, write_file
from pimerge.embedding.embed_expert import projections_of, updates_of
from pimerge.embedding.random_projection import DIRECTIONS, from_texts
from pimerge.embedding.store import SIDECARS, open_store
from pimerge.embedding.store_schema import Embedding, EmbedSettings, Sidecar, StoreDocument
from pimerge.ranking.measures import fisher
from pimerge.ranking.nearest import SHORTLIST, by_projection, compare

RANK, WIDTH = 8, 768
TARGET = "e00000"
WITH_PEAK = """
import atexit, re, runpy, sys
from pathlib import Path
peak = re.compile("VmHWM:\\s*(\\d+)")  # not the figure of wait4, which counts the pages of the parent process
atexit.register(lambda: print(peak.search(Path("/proc/self/status").read_text())[1], file=sys.stderr))
runpy.run_module("pimerge", run_name="__main__")
"""


def main() -> None:
    """Build the store if it does not exist, and print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--experts", type=int, default=10_000)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--distinct", type=int, default=400)
    parser.add_argument("--family", type=int, default=25)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        path = folder / "embeddings.json"
        if not path.is_file():
            build(folder, arguments)
        whole_command(path)
        document(path)
        one_comparison(path)
        shortlist(path, arguments.distinct)


def build(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the experts, their sidecars and the document."""
    start = time.perf_counter()
    layers = [f"layers.{i}.proj" for i in range(round(arguments.parameters / (2 * RANK * WIDTH)))]
    (folder / SIDECARS).mkdir(parents=True)
    names = [f"e{i:05}" for i in range(arguments.experts)]
    entries = {}
    for number, name in enumerate(names[: arguments.distinct]):
        entries[name] = add_expert(folder, name, number // arguments.family, number % arguments.family, layers)
    others = names[arguments.family : arguments.distinct]
    for number, name in enumerate(names[arguments.distinct :]):
        entries[name] = add_copy(folder, name, others[number % len(others)], entries)
    write_file(folder / "embeddings.json", json_text(StoreDocument(experts=entries).model_dump()))
    print(
        f"built {len(names)} experts of {2 * RANK * WIDTH * len(layers)} parameters in {len(layers)} layers, "
        f"{arguments.distinct} of them distinct, in {time.perf_counter() - start:.0f} s",
        flush=True,
    )


def add_expert(folder: Path, name: str, family: int, distance: int, layers: list[str]) -> Embedding:
    """Add one expert: the core of its family, plus noise in proportion to its distance."""
    core, own = torch.Generator().manual_seed(family), torch.Generator().manual_seed(1000 + family * 1000 + distance)
    init = torch.Generator().manual_seed(999_999)
    noise = 0.2 + 0.1 * distance
    adapter, marginals, diagonal = {}, {}, {}
    for layer in layers:
        key = f"base_model.model.{layer}"
        A, B = normal(init, RANK, WIDTH) + noise * 0.1 * normal(own, RANK, WIDTH), mixed(core, own, noise, WIDTH, RANK)
        adapter |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
        seen = mixed(core, own, noise, DIRECTIONS, DIRECTIONS)
        marginals |= {
            f"gradient.{layer}": seen @ seen.T,
            f"input.{layer}": mixed(core, own, noise, WIDTH).square(),
            f"output.{layer}": mixed(core, own, noise, WIDTH).square(),
        }
        diagonal |= {f"{key}.lora_B.weight": B.square()}
    experts = folder / "experts" / name
    experts.mkdir(parents=True)
    save_file(adapter, experts / WEIGHTS, {"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": RANK, "lora_alpha": RANK}
    (experts / CONFIG).write_text(json_text({**config, "target_modules": ["proj"]}))
    expert = open_expert(experts)
    marginals |= updates_of(expert)
    files = {"diagonal": f"{SIDECARS}/{name}.safetensors", "marginals": f"{SIDECARS}/{name}.marginals.safetensors"}
    for part, tensors in (("diagonal", diagonal), ("marginals", marginals)):
        save_file(tensors, folder / files[part], {"format": "pt"})
    return Embedding(
        path=f"experts/{name}",
        sha256=expert.sha256,
        config_sha256=sha256_file(experts / CONFIG),
        task_sha256="0",
        kind=expert.kind,
        base=expert.base.identity,
        task={},
        settings=EmbedSettings(),
        examples=1,
        tokens=1,
        device="cpu",
        route="rules",
        norm=1.0,
        trace=1.0,
        largest=1.0,
        sketches=projections_of(marginals),
        sidecars={part: Sidecar(file=file, sha256=sha256_file(folder / file)) for part, file in files.items()},
    )


def add_copy(folder: Path, name: str, like: str, entries: dict[str, Embedding]) -> Embedding:
    """Add an expert whose files are hard links to those of another."""
    experts, entry = folder / "experts" / name, entries[like]
    experts.mkdir()
    for file in (WEIGHTS, CONFIG):
        os.link(folder / entry.path / file, experts / file)
    sidecars = {}
    for part, sidecar in entry.sidecars.items():
        file = sidecar.file.replace(like, name)
        os.link(folder / sidecar.file, folder / file)
        sidecars[part] = sidecar.model_copy(update={"file": file})
    return entry.model_copy(update={"path": f"experts/{name}", "sidecars": sidecars})


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=generator)


def mixed(core: torch.Generator, own: torch.Generator, noise: float, *shape: int) -> Tensor:
    """The core of a family, mixed with an expert's own numbers."""
    return normal(core, *shape) + noise * normal(own, *shape)


def document(path: Path) -> None:
    """Print the size of the document, and the part of the random projections in it."""
    entries = open_store(path).experts
    sketches = sum(len(text) for entry in entries.values() for text in entry.sketches.values())
    print(
        f"document: {path.stat().st_size / 1e6:.1f} MB for {len(entries)} experts, "
        f"random projections {sketches / len(entries):.0f} bytes per expert"
    )


def whole_command(path: Path) -> None:
    """Print the cost of the whole command: with every file to be hashed, then with remembered hashes."""
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first", "again", "again"):
            command = [sys.executable, "-c", WITH_PEAK, "rank", "--target", TARGET, "--measure", "fisher"]
            environment = {**os.environ, "XDG_CACHE_HOME": cache}
            start = time.perf_counter()
            ran = subprocess.run(
                [*command, "--quiet", "--force"], cwd=path.parent, env=environment, capture_output=True, text=True
            )
            seconds = time.perf_counter() - start
            if ran.returncode:
                raise SystemExit(f"pimerge rank ended with {ran.returncode}: {ran.stderr}")
            print(f"pimerge rank, {name}: {seconds:.2f} s, peak {int(ran.stderr) / 1024:.0f} MB", flush=True)


def one_comparison(path: Path) -> None:
    """Print the seconds of the parts of one comparison, after torch is imported."""
    start = time.perf_counter()
    store = open_store(path)
    opened = time.perf_counter()
    by_projection(store, TARGET, [name for name in store.experts if name != TARGET])
    listed = time.perf_counter()
    compare(store, TARGET, fisher.MEASURE)
    end = time.perf_counter()
    print(
        f"in process: open the store {opened - start:.2f} s, shortlist {listed - opened:.2f} s, "
        f"compare (with a shortlist) {end - listed:.2f} s"
    )


def shortlist(path: Path, distinct: int) -> None:
    """Print the error of the random projections, and how many of the exact best 10 the shortlist contains."""
    store = open_store(path)
    names = [name for name in list(store.experts)[:distinct] if name != TARGET]
    members = [store.view(name, store.open(name), moments=True) for name in (TARGET, *names)]
    exact = fisher.similarity(members, len(names), []).scores()  # without centring
    estimated = np.zeros(len(names))
    for part in ("gradients", "update"):
        rows = from_texts([store.experts[name].sketches[part] for name in (TARGET, *names)]).astype(np.float64)
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        estimated += unit[1:] @ unit[0] / 2
    error = estimated - exact
    print(
        f"projected and exact cosines, {len(names)} pairs: standard error {np.sqrt(np.mean(error**2)):.4f}, "
        f"mean {error.mean():+.4f}, largest {np.abs(error).max():.4f}"
    )
    centred = fisher.similarity(members, len(names), range(len(members))).scores().tolist()
    best = sorted(names, key=lambda name: -centred[names.index(name)])[:10]
    found = by_projection(store, TARGET, [name for name in store.experts if name != TARGET])[:SHORTLIST]
    print(f"recall of the exact best 10 in the shortlist of {len(found)}: {len(set(best) & set(found)) / 10:.0%}")


if __name__ == "__main__":
    main()
