"""Find the experts of a pool: folders and files in it, and further down where the pool holds none itself."""

from __future__ import annotations

import re
from pathlib import Path

from pimerge.adapters.expert_files import CONFIG, WEIGHTS, looks_like_expert
from pimerge.adapters.source import adapter_files
from pimerge.core.errors import PimergeError

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_DEEPEST = 3  # org/name/checkpoint-100


def find_experts(pool: Path) -> list[Path]:
    """Find the experts of a pool, or the pool itself if it is one.

    An expert is a folder that holds an adapter, or an adapter's file. A run of transformers' Trainer stands for its own
    adapter, or for its checkpoints if it has none. A pool without experts is searched further down, such as for
    ``org/name/checkpoint-100``.
    """
    if not pool.is_dir():
        raise PimergeError(f"there is no folder '{pool}'", "name the folder that holds the experts")
    if looks_like_expert(pool):
        return [pool]
    for depth in range(1, _DEEPEST + 1):
        if found := _experts_at(pool, depth):
            return found
    if any(pool.glob("*.safetensors")):
        raise PimergeError(
            f"'{pool}' holds state dicts but no expert",
            f"use them without a store: pimerge rank --target {pool}/NAME.safetensors, pimerge merge FILE FILE",
        )
    raise PimergeError(
        f"'{pool}' holds no expert",
        f"expected folders with {CONFIG} and {WEIGHTS}, as PEFT's save_pretrained writes them, or files of adapters",
    )


def _experts_at(folder: Path, depth: int) -> list[Path]:
    """The experts some levels below a folder, in alphabetical order."""
    if depth > 1:
        return [expert for child in _folders(folder) for expert in _experts_at(child, depth - 1)]
    found: list[Path] = []
    for child in sorted([*adapter_files(folder), *_folders(folder)]):
        if child.is_file() or looks_like_expert(child):
            found.append(child)
        elif checkpoints := checkpoints_of(child):
            found += checkpoints
        elif len(adapter_files(child)) == 1:
            found.append(child)
    return found


def checkpoints_of(run: Path) -> list[Path]:
    """The adapters among the checkpoints of a run of transformers' Trainer, in the order of their steps."""
    found = [(int(match[1]), child) for child in _folders(run) if (match := _CHECKPOINT.fullmatch(child.name))]
    return [child for _, child in sorted(found) if looks_like_expert(child)]


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
