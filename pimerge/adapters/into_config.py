"""The ``config.json`` of a checkpoint that an adapter is merged into: untied weights, labels, vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pimerge.checkpoints.checkpoint import Checkpoint
from pimerge.checkpoints.key_mapping import Names, skeleton
from pimerge.checkpoints.vocabularies import token_parameters, vocabulary_of, with_vocabulary
from pimerge.core.errors import PimergeError, Problems

Shape = tuple[int, ...]
_ADAPTER = "merge into an adapter instead (without --into)"
_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def label_fields(labels: list[str]) -> dict[str, Any]:
    """The fields of ``config.json`` that name a classifier's labels.

    >>> label_fields(["cat"])
    {'id2label': {'0': 'cat'}, 'label2id': {'cat': 0}}
    """
    return {
        "id2label": {str(index): name for index, name in enumerate(labels)},
        "label2id": {name: index for index, name in enumerate(labels)},
    }


def model_class(checkpoint: Checkpoint, adapter: Mapping[str, Any]) -> str | None:
    """The class of the model that an adapter was trained in, by its config; None if the config does not tell."""
    import transformers

    mapping, model_type = adapter.get("auto_mapping"), checkpoint.config.get("model_type")
    stated = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    name = str(stated or _AUTO_CLASSES.get(str(adapter.get("task_type"))))
    kind = getattr(transformers, name, None)
    if kind is None or not name.startswith("Auto"):
        return name if kind is not None else None
    if model_type not in transformers.CONFIG_MAPPING:
        return None
    found = getattr(kind, "_model_mapping", {}).get(transformers.CONFIG_MAPPING[model_type], None)
    found = found[0] if isinstance(found, tuple) else found
    return None if found is None else str(found.__name__)


def separated(
    checkpoint: Checkpoint, names: Names, touched: set[str], config: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any]]:
    """The tied weights that have to be stored apart once some of them change, and the config that goes with it.

    A decoder's config then no longer ties them. Where the config cannot say so (T5 and other encoder-decoders, some of
    which also scale their outputs by that field), all that differ are stored: transformers ties two stored tensors only
    if they are equal.

    Args:
        touched: the keys that change.

    Returns:
        key that is added → key of the stored tensor that it shared before, and the config.
    """
    aliases: dict[str, str] = dict(names.shared or {})
    if not touched & {*aliases, *aliases.values()}:
        return {}, config
    stray = [name for name in aliases if names.rename(name) != name]
    if stray:
        raise PimergeError(
            f"{', '.join(sorted(aliases))} share one tensor, which transformers does not untie in this model",
            "merge into an adapter instead, or leave out the module that shares its weight",
        )
    changed = {
        key: {**value, "tie_word_embeddings": False}
        if isinstance(value, dict) and value.get("tie_word_embeddings")
        else value
        for key, value in config.items()
    } | {"tie_word_embeddings": False}
    if not config.get("is_encoder_decoder"):
        model = skeleton(checkpoint, changed)
        if model is not None and not model.all_tied_weights_keys:
            return aliases, changed
    moved = {name for name in aliases if name in touched}
    stored = {names.parameter[key] for key in {*aliases.values()} & touched}
    if stored & names.sources:  # the others would be tied to the changed one
        return aliases, config
    return {name: key for name, key in aliases.items() if name in moved or name in names.sources}, config


def fitted(checkpoint: Checkpoint, names: Names, config: Mapping[str, Any], new: Mapping[str, Shape]) -> dict[str, Any]:
    """The config of a model whose parameters have the shapes that will be written.

    A resized vocabulary sets ``vocab_size``; a classifier's head with another number of labels sets ``id2label``. Any
    other difference is refused, since transformers would not load the checkpoint.

    Args:
        new: key → shape, for the tensors that are replaced or added.
    """
    found = dict(config)
    model = skeleton(checkpoint, found)
    if model is None:
        return _by_rows(checkpoint, found, new)
    shapes = {names.parameter.get(key, key): shape for key, shape in _written(checkpoint, new).items()}
    wrong = _misfits(model, names, shapes)
    if not wrong:
        return found
    rows = {shapes[name][0] for name in token_parameters(model) & wrong.keys() & {*map(names.parameter.get, new), *new}}
    if len(rows) == 1:
        found = with_vocabulary(model.config, found, rows.pop())
    labels = {shapes[name][0] for name in wrong if names.in_head(name) or name in new} - rows
    if len(labels) == 1 and not rows and found.get("id2label") == checkpoint.config.get("id2label"):
        found |= label_fields([f"LABEL_{index}" for index in range(labels.pop())])
    changed = skeleton(checkpoint, found)
    before = {names.parameter[key]: checkpoint.entry(key).shape for key in checkpoint.home}
    known = _misfits(model, names, before)
    shared = {name: checkpoint.entry(key).shape for name, key in (names.shared or {}).items() if key in checkpoint.home}
    groups: dict[tuple[Shape, Shape, bool], list[str]] = {}
    for name, (shape, expected) in _misfits(changed, names, shapes).items():
        if name not in known or shape != before.get(name):
            groups.setdefault((shape, expected, shape == (shared | before).get(name)), []).append(name)
    problems = Problems()
    for (shape, expected, is_of_base), found_in in groups.items():
        verb, pronoun = ("is", "it") if len(found_in) == 1 else ("are", "them")
        where = f"in the base, and the adapter does not hold {pronoun}" if is_of_base else "in the adapter"
        problems.add(
            f"{', '.join(map(repr, found_in))} {verb} {shape} {where}, but the model that results needs {expected}",
            f"train and save the adapter with modules_to_save for every part that was resized, or {_ADAPTER}",
        )
    problems.raise_any("transformers could not load the merged checkpoint")
    return found


def _written(checkpoint: Checkpoint, new: Mapping[str, Shape]) -> dict[str, Shape]:
    return {key: checkpoint.entry(key).shape for key in checkpoint.home} | dict(new)


def _misfits(model: Any, names: Names, shapes: Mapping[str, Shape]) -> dict[str, tuple[Shape, Shape]]:
    """Parameter → its shape and the model's, where they differ."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    named = {names.rename(name) if name not in own else name: shape for name, shape in shapes.items()}
    return {
        name: (shape, own[name])
        for name, shape in named.items()
        if name in own and name not in names.converted and shape != own[name]
    }


def _by_rows(checkpoint: Checkpoint, config: dict[str, Any], new: Mapping[str, Shape]) -> dict[str, Any]:
    """As :func:`fitted`, for a model that transformers does not know: by the number of rows alone."""
    size = vocabulary_of(config)
    rows = {
        shape[0]
        for key, shape in new.items()
        if key in checkpoint.home and checkpoint.entry(key).shape[:1] == (size,) and shape[:1] != (size,)
    }
    if len(rows) != 1:
        return config
    grown = rows.pop()
    return {
        key: {**value, "vocab_size": grown}
        if isinstance(value, dict) and value.get("vocab_size") == size
        else grown
        if key == "vocab_size"
        else value
        for key, value in config.items()
    }
