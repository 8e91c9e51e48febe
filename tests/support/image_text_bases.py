"""Tiny base models that answer in text about images, made from configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    PreTrainedTokenizerFast,
)

from tests.support.bases import _SMALL, END, byte_level_tokenizer


def image_text_tokenizer(length: int, *, wraps: bool) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with a token for pieces of an image.

    Args:
        wraps: whether it puts a text between its begin and its end, as BART's does.
    """
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level_tokenizer("<image>")
    if wraps:
        ends = [("<s>", tokenizer.token_to_id("<s>")), ("</s>", END)]
        tokenizer.post_processor = TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", ends)
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    extra = {"image_token": "<image>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, extra_special_tokens=extra, **names
    )


def save_florence2(folder: Path, length: int = 48, places: int = 0) -> None:
    """A Florence-2 for 16 × 16 images: a DaViT of two stages, of which the first has four windows, and a BART.

    Args:
        length: tokens that it takes.
        places: how many tokens for places in an image it has.
    """
    tokenizer = image_text_tokenizer(length, wraps=True)
    tokenizer.add_tokens([f"<loc_{place}>" for place in range(places)], special_tokens=True)
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": END, "decoder_start_token_id": END}
    vision = {
        "depths": [1, 1],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [8, 16],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
        "window_size": 4,
        "projection_dim": 16,
        "max_position_embeddings": 8,
        "drop_path_rate": 0.0,
    }
    sides = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
    text = {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in sides.items()}
    text |= {"model_type": "bart", "vocab_size": len(tokenizer), "d_model": 16, "dropout": 0.0, **special}
    text |= {"max_position_embeddings": length, "forced_eos_token_id": END}
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = transformers.Florence2Config(vision_config=vision, text_config=text, image_token_id=image, **special)
    transformers.Florence2ForConditionalGeneration(config).save_pretrained(folder)
    transformers.Florence2Processor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}, image_seq_length=1 + 4 * 4
        ),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


def save_llava(folder: Path) -> None:
    """A LLaVA for 16 × 16 images: a CLIP, of whose two layers the first is read, and a Llama."""
    tokenizer = image_text_tokenizer(40, wraps=False)
    image = tokenizer.convert_tokens_to_ids("<image>")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 16, **sizes}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": END}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), **_SMALL, "max_position_embeddings": 64, **special}
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=image, vision_feature_layer=-2, image_seq_length=4
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def save_paligemma(folder: Path) -> None:
    """A PaliGemma for 16 × 16 images: a SigLIP and a Gemma, which reads a prompt in both directions."""
    image_processor = transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    image_processor.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(image_processor, image_text_tokenizer(60, wraps=False))
    vocabulary = len(processor.tokenizer)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": END}
    one = {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "vocab_size": vocabulary}
    torch.manual_seed(0)
    config = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **sizes},
        text_config={"model_type": "gemma", **sizes, **one, **special},
        image_token_id=processor.image_token_id,
        projection_dim=16,
        hidden_size=16,
        **special,
    )
    transformers.PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def save_idefics3(folder: Path) -> None:
    """An Idefics3, as SmolVLM is one: an image becomes as many tiles as its size needs."""
    tokenizer = image_text_tokenizer(200, wraps=False)
    processor = transformers.Idefics3Processor(
        image_processor=transformers.Idefics3ImageProcessorPil(
            do_image_splitting=True, size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {"model_type": "llama", "vocab_size": len(processor.tokenizer), **sizes, "pad_token_id": 0}
    torch.manual_seed(0)
    config = transformers.Idefics3Config(
        text_config=text,
        vision_config={"image_size": 16, "patch_size": 4, **sizes},
        scale_factor=2,
        image_token_id=processor.image_token_id,
    )
    transformers.Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="session")
def image_text_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a base that answers in text about images, by its name."""
    root = tmp_path_factory.mktemp("image-text")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.is_dir():
            {
                "florence2": save_florence2,
                "llava": save_llava,
                "paligemma": save_paligemma,
                "idefics3": save_idefics3,
            }[name](folder)
        return folder

    return make
