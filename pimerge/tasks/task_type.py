"""Types of task: how rows become batches, and batches a log-likelihood, one file per type.

A type has

- ``AUTO_MODEL``: the transformers class that loads a base for it, and ``PEFT_TASK``: PEFT's name for it; or two of
  each, the second for a base with an encoder and a decoder (:func:`for_base`);
- ``TRAINS_HEAD``: whether the task has a head of its own, beside the expert; else the base's own answers;
- ``COLUMNS``: role → whether ``task.json``'s data must have it; ``label``, the class of a row, is needed where there
  are labels; ``labels`` are the classes of its words; ``NAMED``, if it is there, is the role of a column that the name
  of a class could stand in, as one more example of it;
- ``FIELDS``: what ``task.json`` may say besides the fields of every type, and ``check(file)``, which raises a
  PimergeError with all that does not fit each other there;
- ``load_processor(source, revision)``: tokenizer or image processor of the base;
- ``encode(rows, file, processor, config)`` → :class:`Examples`;
- ``nll(model, batch)``: −log p(y|x) of each example, summed over its target tokens, shape (batch);
- ``draw(model, examples, indices, uniform)``: the examples' classes, or those of their words, drawn from the model's
  own distribution;
- ``score(model, examples, indices)`` → :class:`Scored`;
- ``read(model, reading, examples, indices, answers)``: the vectors that the head reads (n × d) and, if ``answers``, the
  logits of the classes (n × classes); ``reading`` are the modules of which the first to run takes the vectors in.

Files that begin with an underscore hold what several types share.
"""

from __future__ import annotations

from typing import Any, TypeVar

Value = TypeVar("Value", str, None)


def for_base(values: Value | tuple[Value, Value], config: Any) -> Value:
    """What a type has for a base: one value for all, or the second of two if it is an encoder-decoder.

    >>> from types import SimpleNamespace
    >>> for_base(("causal", "encoder-decoder"), SimpleNamespace(is_encoder_decoder=False))
    'causal'
    """
    return values[bool(config.is_encoder_decoder)] if isinstance(values, tuple) else values
