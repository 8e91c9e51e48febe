"""Difference between every merge method and the same method on dense float64 matrices.

    python examples/benchmarks/merging_error.py [--experts 4] [--width 256] [--rank 8]

Random experts in float32 on one module. In the reference, spectral methods use the dense ΔW itself; elementwise
methods use it in the basis of the singular vectors of the dense updates. Prints ‖ΔW − reference‖ / ‖reference‖, with
the result in float32 and at full rank.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pimerge.adapters.expert import Expert, open_expert
from pimerge.merging.method import METHODS, open_method
from pimerge.merging.preparation import prepare
from pimerge.merging.update_merge import UpdateMerge, UpdateSettings

MODULE = "q"


def main() -> None:
    """Print a line per method."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="errors-") as folder:
        experts = [make(Path(folder) / str(seed), seed, arguments) for seed in range(arguments.experts)]
        for name in METHODS.names():
            method = open_method(name)
            chosen = experts[:2] if name == "slerp" else experts
            given = [1 / len(chosen)] * len(chosen) if name == "interpolated" else None
            merge = prepare(
                chosen, method.weights(len(chosen), given), method, UpdateSettings(fisher=fisher, gram=gram)
            )
            merged = merge.module(MODULE).factors
            reference = dense(merge)
            error = float((merged.B.double() @ merged.A.double() - reference).norm() / reference.norm())
            print(f"{name:16} {error:.1e}", flush=True)


def make(folder: Path, seed: int, arguments: argparse.Namespace) -> Expert:
    """A random expert; the factors A share an init."""
    folder.mkdir()
    generator, shared = torch.Generator().manual_seed(seed + 1), torch.Generator().manual_seed(0)
    start = torch.randn(arguments.rank, arguments.width, generator=shared)
    A = start + 0.5 * torch.randn(arguments.rank, arguments.width, generator=generator)
    B = torch.randn(arguments.width, arguments.rank, generator=generator)
    prefix = f"base_model.model.{MODULE}"
    save_file({f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": arguments.rank, "lora_alpha": 2 + seed}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return open_expert(folder)


def fisher(expert: Expert, key: str) -> Tensor:
    """A synthetic Fisher diagonal; its values have no meaning."""
    return expert.tensor(key).roll(1, -1).square()


def gram(expert: Expert, name: str) -> Tensor:
    """A synthetic Gram matrix."""
    A = expert.factors(name).A
    return A.T @ A + torch.eye(A.shape[1])


def dense(merge: UpdateMerge) -> Tensor:
    """The merged ΔW from dense matrices in float64."""
    method, weights = merge.method, torch.tensor(merge.weights[MODULE], dtype=torch.float64)
    parts = [expert.factors(MODULE) for expert in merge.experts]
    scaled = [(part.scaling * part.B.double(), part.A.double()) for part in parts]
    deltas = torch.stack([B @ A for B, A in scaled])
    if method.space == "linear":
        flat = deltas.flatten(1)
        return torch.tensordot(method.coefficients(weights, lambda: flat @ flat.T), deltas, 1)
    if method.space == "inputs":
        grams = [gram(expert, MODULE).double() for expert in merge.experts]
        turned = method.transformed(list(deltas), weights, grams)
        return torch.stack(turned).sum(0)
    if method.space == "factors":
        return by_factor(merge, scaled, weights)
    if method.space in ("spectral", "rows"):
        return method.merge(deltas, weights, limit=min(deltas.shape[1:]))
    if method.space == "reference":
        left = torch.linalg.svd(torch.cat([B for B, _ in scaled], 1), full_matrices=False)[0]
        right = torch.linalg.svd(torch.cat([A for _, A in scaled]), full_matrices=False)[2].T
    else:
        rank = sum(len(part.A) for part in parts)
        left = torch.linalg.svd(torch.cat(list(deltas), 1), full_matrices=False)[0][:, :rank]
        right = torch.linalg.svd(torch.cat(list(deltas)), full_matrices=False)[2][:rank].T
    draws = [f"{expert.file.beginning} {MODULE}" for expert in merge.experts]
    core = method.merge(left.T @ deltas @ right, weights, draws=draws, limit=min(deltas.shape[1:]))
    return left @ core @ right.T


def by_factor(merge: UpdateMerge, scaled: list[tuple[Tensor, Tensor]], weights: Tensor) -> Tensor:
    """Merge every parameter of A and of B, weighted by its Fisher information."""
    merged = []
    for place, letter in ((0, "B"), (1, "A")):
        values = torch.stack([pair[place] for pair in scaled])
        found = []
        for expert in merge.experts:
            module = expert.modules[MODULE]
            own = fisher(expert, getattr(module, letter)).double()
            found.append(own / module.scaling**2 if letter == "B" else own)
        merged.append(merge.method.merge(values, weights, fishers=torch.stack(found)))
    return merged[0] @ merged[1]


if __name__ == "__main__":
    main()
