"""Answers in text: p(y|x) is the product over the tokens of the answer and its end.

Each class of a task with labels has a text, its candidate. The model's answer is the likeliest candidate, or the text
that it generates. For the layout of batches see :mod:`pimerge.tasks.types._encoding`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError
from pimerge.tasks.examples import IGNORED, Batch, Examples, Scored, on_device
from pimerge.tasks.types._classification import invert_distribution
from pimerge.tasks.types._likelihood import ask, begins_behind_prompts, likelihoods, logits, nll
from pimerge.tasks.types._reading import catching, text_config
from pimerge.tasks.types._text_examples import TextExamples, Writing

if TYPE_CHECKING:
    from torch import Tensor, nn


def _token_counts(examples: TextExamples, indices: Sequence[int]) -> Tensor:
    """Count the tokens of each candidate including its end, (n × candidates); 1 for a missing candidate."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    counts = [torch.tensor([len(answer) for answer in examples.tokens[index].answers]) for index in indices]
    return pad_sequence(counts, True, 1)


def draw(model: nn.Module, examples: Examples, indices: Sequence[int], uniform: Tensor) -> list[int]:
    """Sample a candidate for each example from softmax(log p(candidate|x)) at ``uniform`` (n)."""
    assert isinstance(examples, TextExamples)
    if any(len(examples.tokens[index].answers) < 2 for index in indices):
        raise PimergeError(
            "labels cannot be sampled, since the task's answers are free text", "leave out --labels sampled"
        )
    classes = invert_distribution(likelihoods(model, examples, indices), uniform)
    # rounding must not select a candidate that the example does not have
    return [min(drew, len(examples.tokens[index].answers) - 1) for index, drew in zip(indices, classes, strict=True)]


def score(model: nn.Module, examples: Examples, indices: Sequence[int]) -> Scored:
    """Score examples: −log p(y|x), and the answer, which is the likeliest candidate or the generated text."""
    import torch

    assert isinstance(examples, TextExamples)
    rights = [examples.tokens[index].right for index in indices]
    if examples.writing is None:
        found = likelihoods(model, examples, indices)
        likeliest = (found / _token_counts(examples, indices) if examples.per_token else found).argmax(1).tolist()
        losses = -found[torch.arange(len(indices)), rights]
        words = [examples.texts[index].answers[choice] for index, choice in zip(indices, likeliest, strict=True)]
        return Scored(losses, [a == b for a, b in zip(likeliest, rights, strict=True)], likeliest, words)
    with torch.no_grad():
        losses = nll(model, on_device(examples.batch(indices), next(model.parameters()).device))
        words, cut = generate(model, examples.writing, indices)
    pairs = [(examples.texts[index], word) for index, word in zip(indices, words, strict=True)]
    chosen = [text.answers.index(word) if word in text.answers else None for text, word in pairs]
    return Scored(losses, [word in text.references for text, word in pairs], chosen, words, cut)


def generate(model: Any, writing: Writing, indices: Sequence[int]) -> tuple[list[str], list[bool]]:
    """Generate an answer to each prompt, and tell whether it reached the maximum length without an end.

    Uses the model's own generation config, without sampling.
    """
    batch = on_device(writing.prompts(indices), next(model.parameters()).device)
    lengths = batch["attention_mask"].sum(1).tolist()
    if writing.start is None and _puts_vectors_before(model) and len(set(lengths)) > 1:
        return _generate_by_length(model, writing, indices, lengths)
    own = model.generation_config.eos_token_id
    ends = {*writing.ends, *(own if isinstance(own, list) else [] if own is None else [own])}
    start = {} if writing.start is None else {"decoder_start_token_id": writing.start}
    # BART's config forces an end token at the maximum length, which would hide that the answer is cut
    forced = model.generation_config.forced_eos_token_id is not None
    written = model.generate(
        **batch,
        **start,
        max_new_tokens=writing.most + forced,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(ends),
        pad_token_id=writing.pad,
    )
    skipped = batch["input_ids"].shape[1] if writing.start is None else 1
    words, cut = [], []
    for row in written[:, skipped:].tolist():
        row = row[: writing.most]
        end = next((place for place, token in enumerate(row) if token in ends), None)
        cut.append(end is None)
        words.append(writing.decode(row[:end]).strip())
    return words, cut


def _puts_vectors_before(model: Any) -> bool:
    """Whether PEFT puts a prompt before the text; left padding between them would shift the text's positions."""
    config = getattr(model, "active_peft_config", None)
    return config is not None and config.peft_type == "PROMPT_TUNING"


def _generate_by_length(
    model: Any, writing: Writing, indices: Sequence[int], lengths: Sequence[int]
) -> tuple[list[str], list[bool]]:
    """Like :func:`generate`, for prompts of one length at a time, so without padding."""
    words, cut = [""] * len(indices), [False] * len(indices)
    for length in sorted(set(lengths)):
        places = [place for place, own in enumerate(lengths) if own == length]
        found, without_end = generate(model, writing, [indices[place] for place in places])
        for place, word, endless in zip(places, found, without_end, strict=True):
            words[place], cut[place] = word, endless
    return words, cut


def read(
    model: nn.Module, reading: Mapping[str, nn.Module], examples: Examples, indices: Sequence[int], answers: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the output layer's inputs at the answer's first token, and log p(candidate|x) if ``answers``."""
    import torch

    assert isinstance(examples, TextExamples)
    found = None
    with torch.no_grad(), catching(reading.values()) as seen:
        if answers and examples.writing is None:  # the first pass reads the prompts, or the first candidates
            found = likelihoods(model, examples, indices)
        elif begins_behind_prompts(model, examples):
            ask(model, examples, indices)
        else:
            logits(model, on_device(_with_first_candidates(examples, indices), next(model.parameters()).device))
    if begins_behind_prompts(model, examples):
        return seen[0][:, -1], found
    begin = getattr(text_config(model), "bos_token_id", None)
    labels = _with_first_candidates(examples, indices)["labels"]
    begins = labels == (IGNORED if begin is None else begin)  # BART's answers begin with an empty token
    first = ((labels != IGNORED) & ~begins).int().argmax(1)
    states = seen[0][:, -labels.shape[1] :]
    return states[torch.arange(len(states), device=states.device), first.to(states.device)], found


def _with_first_candidates(examples: TextExamples, indices: Sequence[int]) -> Batch:
    return examples.collate([examples.labelled(index, 0) for index in indices])
