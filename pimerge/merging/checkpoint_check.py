"""Check a full checkpoint that was written, before it is put in place.

Its header is read again: it must have the tensors of the checkpoint that it was made from, except for those that the
merge adds or resizes, and its config must state the sizes of its embeddings and its head.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from pimerge.adapters.keys import OF_TOKENS
from pimerge.adapters.output_check import BUG
from pimerge.checkpoints.checkpoint import Checkpoint, open_checkpoint, require_weights
from pimerge.checkpoints.safetensors_file import is_finite
from pimerge.checkpoints.vocabularies import vocabulary_of
from pimerge.core.errors import PimergeError, Problems

Shapes = Mapping[str, tuple[int, ...]]
_CLASSIFIERS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")


def check_checkpoint(path: Path, source: Checkpoint, changed: Shapes) -> None:
    """Compare a written checkpoint with the one that it was made from.

    Args:
        path: its folder or file.
        changed: key → shape of each tensor that the merge adds or resizes.
    """
    problems, expected = Problems(), {key: source.entry(key).shape for key in source.home} | dict(changed)
    with problems.collected():
        found = open_checkpoint(path)
        shapes = {key: found.entry(key).shape for key in found.home}
        for key in sorted(expected.keys() | shapes.keys()):
            if shapes.get(key) != expected.get(key):
                stated, written = (each.get(key, "missing") for each in (expected, shapes))
                problems.add(f"'{key}' is {written} in the result, expected {stated}", BUG)
        if not found.is_file and not problems.found:
            _check_config(found, source, changed, problems)
            if "transformers.modeling_utils" in sys.modules:  # not imported only for this
                _check_model(found, problems)
    if problems.found:
        raise PimergeError("the checkpoint was not written, since it would not load", problems=problems.found)


def check_trained(path: Path) -> None:
    """Check the folder of a model that was trained and saved: its numbers, and its shapes against its own config."""
    problems = Problems()
    with problems.collected():
        found = open_checkpoint(path)
        require_weights(found)
        broken = [key for key in found.home if not is_finite(found.read(key))]
        if broken:
            problems.add(
                f"{len(broken)} of {len(found.home)} trained tensors hold NaN or Inf, such as '{broken[0]}'",
                "the training diverged: train with a lower learning rate",
            )
        _check_model(found, problems)
    if problems.found:
        raise PimergeError("the trained model was not written", problems=problems.found)


def _check_config(found: Checkpoint, source: Checkpoint, changed: Shapes, problems: Problems) -> None:
    """Compare the vocabulary and the labels in the config with the tensors that changed."""
    before, now = vocabulary_of(source.config), vocabulary_of(found.config)
    labels = found.config.get("id2label")
    for key, shape in changed.items():
        is_known = key in source.home and key.removesuffix(".weight").rpartition(".")[2] in OF_TOKENS
        if is_known and source.entry(key).shape[0] == before and now != shape[0]:
            problems.add(f"'{key}' has {shape[0]} rows, but config.json states {now} tokens", BUG)
        if key.endswith(_CLASSIFIERS) and isinstance(labels, dict) and len(shape) == 2 and len(labels) != shape[0]:
            problems.add(f"'{key}' has {shape[0]} rows, but config.json states {len(labels)} labels", BUG)


def _check_model(found: Checkpoint, problems: Problems) -> None:
    """Compare the shapes with those of the model that the config describes, if transformers knows it."""
    from pimerge.checkpoints.key_mapping import names_of, skeleton

    model = skeleton(found, found.config)
    if model is None:
        return
    names, own = names_of(found), {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for key, name in names.parameter.items():
        shape = found.entry(key).shape
        if name in own and name not in names.converted and own[name] != shape:
            problems.add(f"'{key}' is {shape}, but the model of config.json has {own[name]}", BUG)
