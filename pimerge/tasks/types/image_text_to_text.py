"""Answers in text about an image and a prompt, or a prompt alone (``image``; Florence-2, LLaVA, Qwen2-VL, SmolVLM).

The base's own processor prepares image and prompt. An image goes before a prompt that has no place for it. An
encoder-decoder is prompted as in ``seq2seq``, any other base as in ``causal-lm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pimerge.core import hf_loading
from pimerge.core.errors import PimergeError
from pimerge.tasks.examples import Batch, Examples, Rows
from pimerge.tasks.row_errors import RowProblems
from pimerge.tasks.task_type import TaskType
from pimerge.tasks.types import _encoding as encoding
from pimerge.tasks.types import causal_lm, seq2seq
from pimerge.tasks.types._generation import draw, read, score
from pimerge.tasks.types._images import decoder, mode_of, remembered
from pimerge.tasks.types._likelihood import nll
from pimerge.tasks.types._templates import Template, Text, check_texts
from pimerge.tasks.types._text_examples import Prompts

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from pimerge.tasks.schema import TaskFile

_PROMPT = "input_ids"
_TYPES = ("mm_token_type_ids", "token_type_ids")
_OF_TOKENS = (_PROMPT, "attention_mask", "labels", *_TYPES)


def check(file: TaskFile) -> None:
    """Check the prompt and answers of ``task.json``."""
    check_texts(file)
    if file.prompt is not None and file.columns.get("image") in Template("prompt", file.prompt).names:
        raise PimergeError(
            f"the prompt names the column '{file.columns['image']}', which holds the image",
            "leave it out: the model is shown the image anyway",
        )


def load_processor(source: str, revision: str | None) -> Any:
    """Load the base's processor of images and texts; a missing one is a ValueError, as in transformers."""
    from transformers import AutoProcessor

    processor = hf_loading.load_processor(AutoProcessor, source, revision)
    if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
        raise ValueError("it has no processor for images and texts together (processor_config.json)")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def encode(rows: Rows, file: TaskFile, processor: Any, config: PreTrainedConfig) -> Examples:
    """Process every row once; up to 256 MB of the images are cached, others are processed again when needed.

    A prompt that is too long is cut as in ``seq2seq`` or ``causal-lm``, but its image is never cut.
    """
    worded = encoding.in_words(rows, file)
    if file.chat:
        _require_chat(processor, config)
    reader = _Reader(processor, config, bool(file.chat))
    prompts = (_image_prompts if "image" in rows.columns else _text_prompts)(rows, worded.texts, reader)
    tokenizer, text_config = processor.tokenizer, config.get_text_config()
    if config.is_encoder_decoder:
        return seq2seq.encode_prompts(worded, prompts, tokenizer, text_config)
    return causal_lm.encode_prompts(worded, prompts, processor, tokenizer, text_config, content=_turn_content)


def _require_chat(processor: Any, config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise PimergeError("'chat' is for causal models, and the base has an encoder and a decoder", "leave it out")
    causal_lm.require_chat_template(processor)


def _turn_content(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


@dataclass(frozen=True)
class _Reader:
    """A base's processor and its settings."""

    processor: Any
    config: PreTrainedConfig
    chat: bool

    @property
    def image_token(self) -> int | None:
        """The token that represents a piece of an image."""
        found: int | None = getattr(self.processor, "image_token_id", None)
        return found if found is not None else getattr(self.config, "image_token_id", None)

    def tokens(self, text: str) -> list[int]:
        """Tokenize a prompt without an image."""
        tokenizer = self.processor.tokenizer
        if (place := getattr(self.processor, "image_token", None)) and place in text:
            raise PimergeError(
                f"the prompt has a place for an image, {place}, and the task shows none",
                'name the column of the images: "columns": {"image": …}, or leave the place out',
            )
        if self.chat:
            return causal_lm.plain(tokenizer, causal_lm.turn(self.processor, _turn_content(text)))
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return self._without_end(ids)

    def with_image(self, text: str, image: Any, before: str) -> Batch:
        """Process a prompt and an image.

        Args:
            before: placeholder to put before a prompt without one; empty if the processor inserts it.
        """
        import torch

        if self.chat:
            text = causal_lm.turn(self.processor, [{"type": "image"}, *_turn_content(text)])
        elif before not in text:
            text = f"{before}\n{text}"
        special = {"add_special_tokens": False} if self.chat else {}
        try:
            found = self.processor(text=[text], images=[image], return_tensors="pt", **special)
        except ValueError as error:  # such as Florence-2's, for a task token among other words
            raise PimergeError(f"the base's processor does not take the prompt: {error}", "fix the prompt") from error
        return {**found, _PROMPT: torch.tensor(self._without_end(found[_PROMPT][0].tolist()))}

    @property
    def reads_prompts_both_ways(self) -> bool:
        """Whether prompt tokens attend to later prompt tokens, so the model needs to know where the answer begins."""
        return bool(self.config.model_type == "paligemma")

    def types(self, ids: list[int], answered: int) -> Tensor:
        """The type of each token: 1 for a piece of an image, or for the answer if prompts are read both ways."""
        import torch

        if self.reads_prompts_both_ways:
            return torch.tensor([0] * (len(ids) - answered) + [1] * answered)
        return torch.tensor([int(token == self.image_token) for token in ids])

    def places_images(self, mode: str) -> bool:
        """Whether the processor itself inserts a place for an image into a prompt."""
        from PIL import Image

        try:
            found = self.processor(text=["?"], images=[Image.new(mode, (32, 32))], return_tensors="pt")
        except (ValueError, IndexError):
            return False
        return self.image_token is None or self.image_token in found["input_ids"][0].tolist()

    def _without_end(self, ids: list[int]) -> list[int]:
        """Drop the end token for a causal model."""
        causal = not self.config.is_encoder_decoder
        return ids[:-1] if causal and len(ids) > 1 and ids[-1] == self.processor.tokenizer.eos_token_id else ids

    def cut(self, ids: list[int], room: int) -> list[int]:
        """Cut a prompt to fit: a causal model's at the beginning, an encoder's at the end."""
        if len(ids) <= room:
            return ids
        shown = 1 + max((place for place, token in enumerate(ids) if token == self.image_token), default=-1)
        ending = int(self.config.is_encoder_decoder and ids[-1] == self.processor.tokenizer.eos_token_id)
        if shown + ending >= room and shown:
            raise PimergeError(
                f"the prompt has {shown} tokens up to the end of its image, and there is room for {room - ending}",
                "put the image first, shorten the answer, or ask for fewer max_new_tokens",
            )
        if self.config.is_encoder_decoder:
            return [*ids[: room - ending], *ids[len(ids) - ending :]]
        begins = ids[0] == self.processor.tokenizer.bos_token_id and room > 1
        return causal_lm.cut_front(ids, room, max(shown, int(begins)))


def _text_prompts(rows: Rows, texts: Sequence[Text], reader: _Reader) -> Prompts:
    """Tokenize prompts without images."""
    problems = RowProblems(rows.where, rows.numbers)
    tokens: list[list[int]] = []
    for place, text in enumerate(texts):
        with problems.row(place):
            tokens.append(reader.tokens(text.prompt))
    problems.raise_any()

    def beside(place: int, ids: list[int], answered: int) -> Batch:
        return {"token_type_ids": reader.types(ids, answered)} if reader.reads_prompts_both_ways else {}

    return Prompts(tokens, lambda place, room: reader.cut(tokens[place], room), beside)


def _image_prompts(rows: Rows, texts: Sequence[Text], reader: _Reader) -> Prompts:
    """Process prompts with images."""
    mode = mode_of(reader.config.vision_config)
    decode = decoder(rows, mode)
    before = "" if reader.places_images(mode) else str(reader.processor.image_token)
    processed = remembered(lambda place: reader.with_image(texts[place].prompt, decode(place), before))
    problems = RowProblems(rows.where, rows.numbers)
    tokens: list[list[int]] = []
    shapes = set()
    for place in range(len(texts)):
        with problems.row(place):
            found = processed(place)
            tokens.append(found[_PROMPT].tolist())
            shapes.add(tuple(value.shape for name, value in found.items() if name not in _OF_TOKENS))
    problems.raise_any()

    def beside(place: int, ids: list[int], answered: int) -> Batch:
        found = processed(place)
        images = {name: value for name, value in found.items() if name not in _OF_TOKENS}
        return images | {name: reader.types(ids, answered) for name in _TYPES if name in found}

    return Prompts(tokens, lambda place, room: reader.cut(tokens[place], room), beside, alike=len(shapes) == 1)


TASK_TYPE = TaskType(
    name="image-text-to-text",
    summary="Answers in text about an image and a prompt, or a prompt alone (Florence-2, LLaVA, Qwen2-VL, SmolVLM).",
    auto_model="AutoModelForImageTextToText",
    peft_task=None,  # PEFT has no task type for images and uses its plain PeftModel
    trains_head=False,
    columns={"image": False, "label": False},
    fields=encoding.FIELDS | {"chat"},
    answers=("texts",),
    check=check,
    load_processor=load_processor,
    encode=encode,
    nll=nll,
    draw=draw,
    score=score,
    read=read,
)
