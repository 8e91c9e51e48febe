"""Continue an interrupted training from its last complete checkpoint, with an identical result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import is_zipfile

from safetensors import SafetensorError

if TYPE_CHECKING:
    from transformers import Trainer


def train_from(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if there is one.

    A training that had already ended is not continued, because the Trainer would forget its early stopping.
    """
    from safetensors.torch import load_file
    from transformers import TrainerState

    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            trainer.state = state
            best = Path(state.best_model_checkpoint or checkpoint)
            trainer.model.load_state_dict(load_file(best / "model.safetensors"), strict=False)
            return
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def last_complete_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that was written completely."""
    found = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in found if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    from safetensors.torch import load_file

    archives = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
    archives += sorted(checkpoint.glob("rng_state*.pth")) or [checkpoint / "rng_state.pth"]
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        load_file(checkpoint / "model.safetensors")
    except (OSError, ValueError, SafetensorError):
        return False
    best = state.get("best_model_checkpoint")
    return all(map(is_zipfile, archives)) and (best is None or (Path(best) / "model.safetensors").is_file())
