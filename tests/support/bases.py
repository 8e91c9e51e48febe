"""Tiny real base models, made once per test run from configs; nothing comes from the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from pimerge.models.loaded_base import LoadedBase

WORDS = "the a cat dog bird sits runs flies on under mat tree fast slow and or red blue".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def vit_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of two layers for 16 × 16 images, without a head."""
    folder = tmp_path_factory.mktemp("bases") / "vit"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_channels=3,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP whose image encoder has two layers for 16 × 16 images."""
    folder = tmp_path_factory.mktemp("bases") / "clip"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 8, "max_position_embeddings": 8},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, of which the tests know every one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_max_length=24
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def bert_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers."""
    folder = tmp_path_factory.mktemp("bases") / "bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers, whose projections are Conv1D."""
    folder = tmp_path_factory.mktemp("bases") / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS) + 4, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    GPT2Model(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


LANGUAGE_MODELS = ["t5", "bart", "gpt2-lm", "llama-lm", "qwen2-lm"]


END = 4


_SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


def language_model(name: str, vocabulary: int) -> nn.Module:
    """A model that answers in text, of two layers, from its config."""
    special = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": END}
    torch.manual_seed(0)
    match name:
        case "t5":
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
            sizes["dropout_rate"] = 0.0
            return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **special))
        case "bart":
            sides = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}
            sizes = {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in sides.items()}
            tokens = {"bos_token_id": 2, "decoder_start_token_id": END, "forced_eos_token_id": END}
            config = transformers.BartConfig(
                d_model=16, dropout=0.0, max_position_embeddings=32, **sizes, **tokens, **special
            )
            return transformers.BartForConditionalGeneration(config)
        case "gpt2-lm":
            dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=END, **dropout, **special)
            return transformers.GPT2LMHeadModel(config)
        case "llama-lm":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(bos_token_id=2, **_SMALL, **special))
        case "qwen2-lm":
            return transformers.Qwen2ForCausalLM(
                transformers.Qwen2Config(tie_word_embeddings=True, **_SMALL, **special)
            )
    raise AssertionError(name)


def save_language_tokenizer(folder: Path, length: int = 24) -> int:
    """A byte-level tokenizer that merges the tests' words, as GPT-2's and Qwen's do; how many tokens it has."""
    tokenizer = byte_level_tokenizer()
    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", model_max_length=length
    )
    saved.save_pretrained(folder)
    return len(saved)


def byte_level_tokenizer(*more: str) -> Any:
    """The byte-level tokenizer, with more special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<unk>", "<s>", "<|im_end|>", "</s>", *more]
    trainer = trainers.BpeTrainer(
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=[],
        vocab_size=400,
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{word} {word} {word}: ?" for word in WORDS], trainer)
    return tokenizer


IMAGE_TEXT_MODELS = ["florence2", "llava", "paligemma", "idefics3"]


@pytest.fixture(scope="session")
def language_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a base that answers in text, by its name."""
    root = tmp_path_factory.mktemp("language")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.is_dir():
            language_model(name, save_language_tokenizer(folder)).save_pretrained(folder)
        return folder

    return make


def model_for(base: Path, labels: int = 2) -> nn.Module:
    """The base with a fresh head, as transformers loads it."""
    if base.name in LANGUAGE_MODELS:
        seq2seq = base.name in ("t5", "bart")
        kind = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
        return kind.from_pretrained(base).eval()
    if base.name in IMAGE_TEXT_MODELS:
        return transformers.AutoModelForImageTextToText.from_pretrained(base).eval()
    kind = {
        "vit": transformers.AutoModelForImageClassification,
        "clip": transformers.AutoModelForImageClassification,
        "bert": transformers.AutoModelForSequenceClassification,
        "gpt2": transformers.AutoModelForSequenceClassification,
    }[base.name]
    torch.manual_seed(0)
    model = kind.from_pretrained(base, num_labels=labels)
    model.config.pad_token_id = 0
    return model.eval()


class Layers(nn.Module):
    """One layer of each type that LoRA adapts; the name ``proj`` ends the name ``inner.proj``."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.proj = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 6), "other": nn.Linear(6, 6)})
        self.conv = nn.Conv2d(2, 4, (3, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Token indices (batch, 4) → numbers (batch, 4, 2, 2)."""
        hidden = self.inner["other"](self.inner["proj"](self.proj(self.words(x))))
        return self.conv(hidden.reshape(-1, 2, 4, 3))  # type: ignore[no-any-return]


def layers() -> Layers:
    """The same :class:`Layers` every time."""
    torch.manual_seed(0)
    return Layers().eval()


def save_base(folder: Path, weight: Tensor, file: str = "model.safetensors") -> Path:
    """A folder that looks like a base model's, with one tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"weight": weight}, folder / file)
    return folder


def inputs(base: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if base == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    ids = torch.randint(4, 20, (3, 5), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loaded_base(base: Path) -> LoadedBase:
    model = model_for(base).requires_grad_(False)
    return LoadedBase(model, None, ("score",) if base.name == "gpt2" else ("classifier",), False)
