"""What the types that answer in text share: p(y|x) is the product over the tokens of the answer and its end.

Layout: ``labels`` (batch × tokens) stand where the model's output foretells them, −100 elsewhere, so a causal model's
are shifted already. Every class of a task with labels has an answer in words, a candidate; the likeliest one counts,
or what the model writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError
from pimerge.tasks.examples import IGNORED, Batch, Examples, Scored, on_device
from pimerge.tasks.row_errors import RowProblems
from pimerge.tasks.types._classification import drawn
from pimerge.tasks.types._likelihood import ask, begins_behind_prompts, likelihoods, logits, nll
from pimerge.tasks.types._reading import catching, text_config
from pimerge.tasks.types._templates import Text
from pimerge.tasks.types._text_examples import Prompts, TextExamples, Tokens, Writing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pimerge.tasks.examples import Rows
    from pimerge.tasks.schema import TaskFile

COLUMNS = {"label": False}
FIELDS = frozenset({"prompt", "answer", "verbalizer", "scoring", "metrics", "max_new_tokens"})
_USUAL_NEW_TOKENS = 64
_TOKENS = ("input_ids", "decoder_input_ids")


def examples_of(
    texts: Sequence[Text],
    tokens: Sequence[Tokens],
    answered: Callable[[int, int], Batch],
    pad: int,
    truncated: int,
    writing: Writing | None,
    per_token: bool,
    alike: bool,
    asked: Callable[[Sequence[int]], Batch] | None = None,
) -> TextExamples:
    """Put together what a type has encoded."""
    return TextExamples(
        [len(row.prompt) + len(row.answers[row.right]) for row in tokens],
        lambda index: answered(index, tokens[index].right),
        lambda batch: collate(batch, pad),
        truncated,
        [text.references for text in texts],
        alike,
        tokens=tokens,
        answered=answered,
        texts=texts,
        writing=writing,
        per_token=per_token,
        asked=asked,
    )


def collate(examples: Sequence[Batch], pad: int, side: str = "right") -> Batch:
    """Several examples → one batch, tokens padded on one side."""
    from torch.nn.utils.rnn import pad_sequence

    found = {}
    for name, first in examples[0].items():
        values = [example[name] for example in examples]
        if first.dim() == 1:
            value = pad if name in _TOKENS else IGNORED if name == "labels" else 0
            found[name] = pad_sequence(values, True, value, padding_side=side)
        else:
            found[name] = _joined(values)
    return found


def _joined(values: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other on their first axis, filled up with zeros to the largest on the others.

    >>> import torch
    >>> _joined([torch.ones(1, 1), torch.ones(1, 2)]).tolist()
    [[1.0, 0.0], [1.0, 1.0]]
    """
    import torch

    sizes = [max(size) for size in zip(*(value.shape[1:] for value in values), strict=True)]
    fill = [
        [part for size, own in reversed(list(zip(sizes, value.shape[1:], strict=True))) for part in (0, size - own)]
        for value in values
    ]
    return torch.cat([torch.nn.functional.pad(value, more) for value, more in zip(values, fill, strict=True)])


def _token_counts(examples: TextExamples, indices: Sequence[int]) -> Tensor:
    """Tokens of each candidate, its end among them: (n × candidates), 1 where there is none."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    counts = [torch.tensor([len(answer) for answer in examples.tokens[index].answers]) for index in indices]
    return pad_sequence(counts, True, 1)


def draw(model: nn.Module, examples: Examples, indices: Sequence[int], uniform: Tensor) -> list[int]:
    """The candidate of each example drawn from softmax(log p(candidate|x)) at ``uniform`` (n)."""
    assert isinstance(examples, TextExamples)
    if any(len(examples.tokens[index].answers) < 2 for index in indices):
        raise PimergeError(
            "labels cannot be sampled, since the task's answers are free text", "leave out --labels sampled"
        )
    classes = drawn(likelihoods(model, examples, indices), uniform)
    # rounding must not lead beyond an example's own candidates
    return [min(drew, len(examples.tokens[index].answers) - 1) for index, drew in zip(indices, classes, strict=True)]


def score(model: nn.Module, examples: Examples, indices: Sequence[int]) -> Scored:
    """−log p(y|x), and the answer: the likeliest candidate, or what the model writes."""
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
    """What the model writes to each prompt, and whether the answer reached the most tokens without an end.

    By the model's own generation config, but never sampled.
    """
    batch = on_device(writing.prompts(indices), next(model.parameters()).device)
    lengths = batch["attention_mask"].sum(1).tolist()
    if writing.start is None and _puts_vectors_before(model) and len(set(lengths)) > 1:
        return _generate_by_length(model, writing, indices, lengths)
    own = model.generation_config.eos_token_id
    ends = {*writing.ends, *(own if isinstance(own, list) else [] if own is None else [own])}
    start = {} if writing.start is None else {"decoder_start_token_id": writing.start}
    # BART's config forces an end on the last token, where one would not see that the answer is cut
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
    """Whether PEFT puts a prompt before the text: left padding would lie between, and shift the text's positions."""
    config = getattr(model, "active_peft_config", None)
    return config is not None and config.peft_type == "PROMPT_TUNING"


def _generate_by_length(
    model: Any, writing: Writing, indices: Sequence[int], lengths: Sequence[int]
) -> tuple[list[str], list[bool]]:
    """As :func:`generate`, with prompts of one length at a time, so without padding."""
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
    """What the output layer reads where the answer begins, and log p(candidate|x) if the likeliest is the answer."""
    import torch

    assert isinstance(examples, TextExamples)
    found = None
    with torch.no_grad(), catching(reading.values()) as seen:
        if answers and examples.writing is None:  # the first pass is over the prompts, or the first candidates
            found = likelihoods(model, examples, indices)
        elif begins_behind_prompts(model, examples):
            ask(model, examples, indices)
        else:
            logits(model, on_device(_with_first_candidates(examples, indices), next(model.parameters()).device))
    if begins_behind_prompts(model, examples):
        return seen[0][:, -1], found
    begin = getattr(text_config(model), "bos_token_id", None)
    labels = _with_first_candidates(examples, indices)["labels"]
    begins = labels == (IGNORED if begin is None else begin)  # BART's answers begin with a token that says nothing
    first = ((labels != IGNORED) & ~begins).int().argmax(1)
    states = seen[0][:, -labels.shape[1] :]
    return states[torch.arange(len(states), device=states.device), first.to(states.device)], found


def _with_first_candidates(examples: TextExamples, indices: Sequence[int]) -> Batch:
    return examples.collate([examples.labelled(index, 0) for index in indices])


def fit(
    rows: Rows,
    prompts: Prompts,
    answers: Sequence[list[list[int]]],
    texts: Sequence[Text],
    longest: int,
    room: Callable[[int], int],
) -> tuple[list[Tokens], int]:
    """Cut prompts that are too long, never answers; and how many were.

    Args:
        longest: tokens of an answer.
        room: tokens of a row's longest candidate → tokens that its prompt has room for.
    """
    problems = RowProblems(rows.where, rows.numbers)
    found, truncated = [], 0
    for place, (prompt, candidates, text) in enumerate(zip(prompts.tokens, answers, texts, strict=True)):
        with problems.row(place):
            if (most := max(map(len, candidates))) > longest:
                raise PimergeError(
                    f"the answer has {most} tokens with its end, and there is room for {longest}",
                    "shorten the answer or leave the row out",
                )
            kept = prompts.cut(place, room(most))
            truncated += len(kept) < len(prompt)
            found.append(Tokens(kept, candidates, text.right))
    problems.raise_any()
    return found, truncated


def by_likelihood(file: TaskFile) -> bool:
    """Whether the likeliest candidate is the answer, and not what the model writes."""
    return (file.scoring or ("generation" if file.labels is None else "likelihood")) == "likelihood"


def new_tokens(file: TaskFile, longest: int, answers: Sequence[list[list[int]]]) -> int:
    """The most tokens that are generated: what the task says, else enough for each of its answers.

    Args:
        longest: tokens that there is room for.
    """
    if file.max_new_tokens is not None:
        if file.max_new_tokens > longest:
            raise PimergeError(
                f"max_new_tokens is {file.max_new_tokens}, and the model has room for {longest}", "ask for fewer"
            )
        return file.max_new_tokens
    needed = max(len(candidate) for row in answers for candidate in row)
    return min(longest, needed if file.labels else max(needed, _USUAL_NEW_TOKENS))


def decoding(tokenizer: Any, answers: Sequence[list[list[int]]]) -> Callable[[list[int]], str]:
    """Tokens that were written → text without special tokens, unless answers have some that say something.

    Such are Florence-2's places, ``<loc_12>``.
    """
    named = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    control = {getattr(tokenizer, f"{name}_token_id", None) for name in named}
    telling = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special} - control
    told = not telling.isdisjoint(token for row in answers for answer in row for token in answer)

    def decode(ids: list[int]) -> str:
        kept = [token for token in ids if token not in control] if told else ids
        return str(tokenizer.decode(kept, skip_special_tokens=not told))

    return decode


def end_token(processor: Any, config: Any) -> int:
    """The token that ends an answer."""
    own = config.eos_token_id
    found = processor.eos_token_id if processor.eos_token_id is not None else own[0] if isinstance(own, list) else own
    if found is None:
        raise PimergeError(
            "neither the tokenizer nor the model's config has an end token, so no answer would end",
            "set eos_token in the base's tokenizer",
        )
    return int(found)
