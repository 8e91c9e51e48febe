"""Build everything in this folder from scikit-learn's digits: data, tasks, base model, pool of experts.

    python -m examples.digits.make [FOLDER]

Needs ``pip install scikit-learn``. Every random choice is seeded; it takes some minutes on two cores.

The 1,797 scans are divided once, by a seed and evenly over the digits, into five parts: ``pretrain`` trains only the
base; ``train`` trains the experts; ``few`` contains the target's five labels per digit; ``draws`` contains further
ones, which ``pimerge compare`` samples and which the task without an expert uses; ``test`` tests every task. So no
task sees an image that the base was trained on, and no test image trains any task.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import pimerge
from examples.digits.cut import (
    LOOP,
    PARITY,
    Question,
    Transform,
    inverted,
    noisy,
    outlined,
    plain,
    rotated,
    which,
    write_rows,
    write_task,
)
from pimerge.checkpoints.base import find_base
from pimerge.models.loading import quiet_libraries
from pimerge.tuning.options import TrainingOptions

SEED = 0
# scans per digit; the rest of its 174 to 183 is the test part
PARTS = {"pretrain": 60, "train": 65, "few": 5, "draws": 15}
LORA = {"fresh_rank": 4, "fresh_alpha": 8.0, "fresh_modules": ("q_proj", "v_proj"), "batch_size": 32}

POOL: dict[str, tuple[Transform, Question]] = {
    # task shift: another question about the same scans
    "parity": (plain, PARITY),
    "loop": (plain, LOOP),
    # label shift: the same question about disjoint digits
    "digits-0-4": (plain, which(*range(5))),
    "digits-5-9": (plain, which(*range(5, 10))),
    # covariate shift: the same question about changed scans
    "inverted-0-6": (inverted, which(*range(7))),
    "inverted-3-9": (inverted, which(*range(3, 10))),
    "rotated-0-6": (rotated, which(*range(7))),
    "rotated-3-9": (rotated, which(*range(3, 10))),
    "outlined-0-6": (outlined, which(*range(7))),
    "outlined-3-9": (outlined, which(*range(3, 10))),
    "noisy": (noisy, which(*range(10))),
    "noisy-parity": (noisy, PARITY),
}
TARGET = ("X", inverted, which(*range(10)))  # no expert of the pool has seen all ten digits inverted
NEW = ("new", inverted, PARITY)  # a task without an expert


def main() -> None:
    """Build all of it."""
    quiet_libraries()
    torch.set_num_threads(1)  # faster than two threads for a model this small, and the same numbers on any machine
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name in ("data", "tasks", "base", "experts"):
        shutil.rmtree(folder / name, ignore_errors=True)
    images, digits = read_scans()
    parts = divide(digits)
    write_rows(folder / "data" / "digits.parquet", images, digits.tolist(), list(range(len(images))), parts)
    pretrain_base(folder / "base", images, digits, parts)
    for name, (transform, question) in POOL.items():
        write_task(folder / "tasks" / name, images, digits, [transform], question, parts, {"train": ["train"]})
        train_expert(folder, name, TrainingOptions(epochs=20, lr=5e-3, **LORA))
    name, transform, question = TARGET
    splits = {"train": ["few"], "draws": ["draws"]}
    write_task(folder / "tasks" / name, images, digits, [transform], question, parts, splits)
    train_expert(folder, name, TrainingOptions(epochs=30, lr=5e-3, **LORA))
    name, transform, question = NEW
    write_task(folder / "tasks" / name, images, digits, [transform], question, parts, {"train": ["draws"]})


def read_scans() -> tuple[list[PILImage.Image], np.ndarray]:
    """All 1,797 scans, 8 × 8, and the digits that they show."""
    data = load_digits()
    pixels = np.round(data.images * 255 / 16).astype(np.uint8)
    return [PILImage.fromarray(scan) for scan in pixels], data.target


def divide(digits: np.ndarray) -> list[str]:
    """The part of each scan: a seeded split with equally many scans of every digit."""
    parts = ["test"] * len(digits)
    order = np.random.default_rng(SEED).permutation(len(digits))
    for digit in range(10):
        members = iter(int(index) for index in order if digits[index] == digit)
        for part, size in PARTS.items():
            for _ in range(size):
                parts[next(members)] = part
    return parts


def pretrain_base(folder: Path, images: Sequence[PILImage.Image], digits: np.ndarray, parts: Sequence[str]) -> None:
    """Train a tiny ViT to classify the digits of the ``pretrain`` part, and save it without its head."""
    torch.manual_seed(SEED)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, resample=PILImage.Resampling.BICUBIC)
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=16,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    chosen = [i for i, part in enumerate(parts) if part == "pretrain"]
    pixels = processor([images[i].convert("RGB") for i in chosen], return_tensors="pt")["pixel_values"]
    labels = torch.tensor(digits[chosen])
    epochs, size = 40, 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * -(-len(chosen) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for batch in torch.randperm(len(chosen)).split(size):
            loss = torch.nn.functional.cross_entropy(model(jittered(pixels[batch])).logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.vit.config.num_labels = (
        2  # transformers' default labels: the head is not saved, so the base has no labels of its own
    )
    model.vit.save_pretrained(folder)
    processor.save_pretrained(folder)


def jittered(pixels: Tensor) -> Tensor:
    """Images turned by up to 12°, scaled by up to 10 % and moved by up to a pixel, at random."""
    count = len(pixels)
    angle = (torch.rand(count) - 0.5) * 2 * np.deg2rad(12)
    scale = 1 + (torch.rand(count) - 0.5) * 0.2
    shift = (torch.rand(2, count) - 0.5) * 0.3
    rows = [
        torch.stack([angle.cos() * scale, -angle.sin() * scale, shift[0]], 1),
        torch.stack([angle.sin() * scale, angle.cos() * scale, shift[1]], 1),
    ]
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    # the area outside the image is black, which is −1 after the processor
    return torch.nn.functional.grid_sample(pixels + 1, grid, align_corners=False) - 1


def train_expert(folder: Path, name: str, options: TrainingOptions) -> None:
    """``pimerge tune --method scratch`` on one task; all experts start from one init."""
    result = pimerge.tune(
        method="scratch",
        target=folder / "tasks" / name,
        base=find_base("base", None, folder),  # named 'base' in the adapters, wherever the folder is
        options=options,
        device="cpu",
        output=folder / "experts" / name,
    )
    outcome = result.outcome
    print(f"{name}: held-out loss {outcome.held_out_loss:.3f} after {outcome.epochs:.0f} epochs", flush=True)


if __name__ == "__main__":
    main()
