"""Tiny real models, tasks and experts, made once per test run from configs; nothing comes from the network.

Experts are made by PEFT alone, so that what pimerge reads and writes is tested against PEFT.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="pimerge-tests-")  # no cache of the user's own
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers fill the cores: more threads would wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
import transformers
from datasets import Dataset, Features, Image, Value, disable_progress_bars
from peft import (
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
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
from typer.testing import CliRunner, Result

from pimerge.adapters.expert import Expert
from pimerge.adapters.low_rank import MergedModule, Truncation
from pimerge.cli.app import app, main
from pimerge.core.progress import Advance, Track
from pimerge.embedding.input_grams import input_grams
from pimerge.embedding.layer_moments import Marginals
from pimerge.merging.merge import prepare
from pimerge.merging.method import open_method
from pimerge.models.loading import draw_head
from pimerge.peft_methods import BitFitConfig, BottleneckConfig
from pimerge.tasks.task import open_task
from pimerge.tasks.types import Batch, Examples
from pimerge.tuning.session import TuningSession

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
disable_progress_bars()

WORDS = "the a cat dog bird sits runs flies on under mat tree fast slow and or red blue".split()  # noqa: SIM905
MakeExpert = Callable[..., Path]
PeftCase = Callable[..., tuple[PeftModel, Examples, list[Batch]]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The scripts first: they take minutes, and no worker shall be left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_readme.py", "test_digits.py"))


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


def write_image_text_task(folder: Path, scans: tuple[list[Any], list[int]], count: int = 12, **fields: Any) -> Path:
    """A task about scans: whether the digit is even; fields replace those of task.json.

    The columns are ``scan``, ``words`` (none to three), ``name`` of the digit, ``parity``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    features = Features(scan=Image(), words=Value("string"), name=Value("string"), parity=Value("int64"))
    images, digits = scans
    for start, split in ((0, "train"), (100, "test")):
        part = range(start, start + count)
        rows = {
            "scan": [images[i] for i in part],
            "words": [" ".join(WORDS[i % 7 : i % 7 + i % 4]) for i in part],
            "name": [WORDS[digits[i]] for i in part],
            "parity": [digits[i] % 2 for i in part],
        }
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    document = {
        "type": "image-text-to-text",
        "data": {"train": "train.parquet", "test": "test.parquet"},
        "columns": {"image": "scan", "label": "parity"},
        "labels": ["dog", "cat"],
        "prompt": "the {{ words }}:",
        **fields,
    }
    write_json(folder / "task.json", {name: value for name, value in document.items() if value is not None})
    return folder


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


def write_text_task(folder: Path, base: str, count: int = 12, **fields: Any) -> Path:
    """A task for a language model of that name: which of two animals a row names; fields replace those of task.json."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    for split in ("train", "test"):
        rows = []
        for index in range(count):
            words = [WORDS[i] for i in torch.randint(4, len(WORDS), (index % 5,), generator=generator).tolist()]
            rows.append(
                {"words": " ".join(["cat" if index % 2 else "dog", *words]), "animal": index % 2, "colour": "red"}
            )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "type": "seq2seq" if base in ("t5", "bart") else "causal-lm",
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "columns": {"label": "animal"},
        "labels": ["dog", "cat"],
        "prompt": "the {{ words }}:",
        **fields,
    }
    write_json(folder / "task.json", {name: value for name, value in document.items() if value is not None})
    return folder


@pytest.fixture(scope="session")
def scans() -> tuple[list[Any], list[int]]:
    """200 real scans of digits as 16 × 16 PIL images, and what they show."""
    from PIL import Image as PILImage
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [
        PILImage.fromarray((pixels * 15).astype("uint8")).resize((16, 16), PILImage.Resampling.BICUBIC)
        for pixels in digits.images[:200]
    ]
    return images, [int(digit) for digit in digits.target[:200]]


def write_image_task(folder: Path, images: Sequence[Any], labels: Sequence[int], names: Sequence[str]) -> Path:
    """A task folder with parquet files: the last quarter is the test split."""
    folder.mkdir(parents=True, exist_ok=True)
    cut = len(images) * 3 // 4
    features = Features({"image": Image(), "label": Value("int64")})
    for split, part in (("train", slice(0, cut)), ("test", slice(cut, None))):
        rows = {"image": list(images[part]), "label": list(labels[part])}
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    write_json(
        folder / "task.json",
        {
            "type": "image-classification",
            "data": {"train": "train.parquet", "test": "test.parquet"},
            "labels": list(names),
        },
    )
    return folder


@pytest.fixture(scope="session")
def parity_task(tmp_path_factory: pytest.TempPathFactory, scans: tuple[list[Any], list[int]]) -> Path:
    """Even or odd: an image task on real scans."""
    images, digits = scans
    folder = tmp_path_factory.mktemp("tasks") / "parity"
    return write_image_task(folder, images, [digit % 2 for digit in digits], ["even", "odd"])


@pytest.fixture(scope="session")
def text_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cat or dog: a text task as JSON lines, with texts of 2 to 12 words."""
    folder = tmp_path_factory.mktemp("tasks") / "pets"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 40), ("test", 20)):
        rows = []
        for index in range(count):
            length = 1 + index % 11
            words = [WORDS[i] for i in torch.randint(4, len(WORDS), (length,), generator=generator).tolist()]
            rows.append({"text": " ".join(["cat" if index % 2 else "dog", *words]), "label": index % 2})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(
        folder / "task.json",
        {
            "type": "text-classification",
            "data": {"train": "train.jsonl", "test": "test.jsonl"},
            "labels": ["dog", "cat"],
        },
    )
    return folder


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file of a test."""
    path.write_text(json.dumps(document, indent=1))


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


TARGETS = {
    "vit": ["q_proj", "v_proj"],
    "clip": ["q_proj", "v_proj"],
    "bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "t5": ["q", "v"],
    "bart": ["q_proj", "v_proj"],
    "gpt2-lm": ["c_attn"],
    "llama-lm": ["q_proj", "v_proj"],
    "qwen2-lm": ["q_proj", "v_proj"],
    "florence2": ["q_proj", "v_proj", "qkv"],
    "llava": ["q_proj", "v_proj"],
    "paligemma": ["q_proj", "v_proj"],
    "idefics3": ["q_proj", "v_proj"],
}
HEADS = {"vit": ["classifier"], "clip": ["classifier"], "bert": ["classifier"], "gpt2": ["score"]}


KINDS = ("ia3", "ln_tuning", "bitfit", "bottleneck", "prefix", "prompt")
"""Those that have no ΔW."""
RELATIVES = ("loha", "lokr", "vera", "randlora", "fourierft")
"""Those whose ΔW is computed."""
PROMPTS = ("prefix", "prompt")
NORMS = {
    "vit": ["layernorm_before", "layernorm_after"],
    "clip": ["layer_norm1", "layer_norm2"],
    "bert": ["LayerNorm"],
    "gpt2": ["ln_1", "ln_2"],
}
FEEDFORWARD = {"vit": ["fc2"], "clip": ["fc2"], "bert": ["intermediate.dense"], "gpt2": ["mlp.c_proj"]}
"""Of these bases; of others PEFT knows the places."""


def peft_config(kind: str, base: str, **config: Any) -> PeftConfig:
    """PEFT's config of a small expert of a kind on one of the tests' bases."""
    task = "SEQ_CLS"
    if base in LANGUAGE_MODELS:
        task = "SEQ_2_SEQ_LM" if base in ("t5", "bart") else "CAUSAL_LM"
    match kind:
        case "lora":
            return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS[base]} | config)
        case "loha":
            return LoHaConfig(**{"r": 2, "alpha": 3, "target_modules": TARGETS[base]} | config)
        case "lokr":
            return LoKrConfig(**{"r": 1, "alpha": 3, "target_modules": TARGETS[base]} | config)
        case "vera":
            fields = {"r": 5, "save_projection": False, "projection_prng_key": 3}
            return VeraConfig(**fields | {"target_modules": TARGETS[base]} | config)
        case "randlora":
            fields = {"r": 5, "randlora_alpha": 20, "save_projection": False, "projection_prng_key": 3}
            return RandLoraConfig(**fields | {"target_modules": TARGETS[base]} | config)
        case "fourierft":
            return FourierFTConfig(**{"n_frequency": 6, "target_modules": TARGETS[base]} | config)
        case "ia3" if base in LANGUAGE_MODELS:
            return IA3Config(**config)
        case "ia3":
            layers = [*TARGETS[base], *FEEDFORWARD[base]]
            return IA3Config(**{"target_modules": layers, "feedforward_modules": FEEDFORWARD[base]} | config)
        case "ln_tuning":
            return LNTuningConfig(**{"target_modules": NORMS.get(base)} | config)
        case "bitfit":
            return BitFitConfig(**config)
        case "bottleneck":
            return BottleneckConfig(**{"bottleneck_dim": 3, "activation": "gelu", "scale": 0.5} | config)
        case "prefix":
            return PrefixTuningConfig(**{"task_type": task, "num_virtual_tokens": 3} | config)
    return PromptTuningConfig(**{"task_type": task, "num_virtual_tokens": 3} | config)


@pytest.fixture(scope="session")
def make_expert() -> MakeExpert:
    """Make an expert with PEFT: ``make_expert(folder, base, task=None, seed=0, init_seed=0, head=True, **config)``.

    ``kind`` is LoRA if it is not given. A comes from PEFT's own init by ``init_seed``, moved a little by ``seed``; B,
    bias and head are random by ``seed``, so that ΔW is not zero: experts with one ``init_seed`` look as if trained
    from one init.
    """

    def make(
        folder: Path,
        base: Path,
        task: Path | None = None,
        *,
        seed: int = 0,
        init_seed: int = 0,
        labels: int = 2,
        head: bool = True,
        kind: str = "lora",
        **config: Any,
    ) -> Path:
        model = model_for(base, labels)
        if head and kind not in PROMPTS and base.name in HEADS:
            config.setdefault("modules_to_save", HEADS[base.name])
        torch.manual_seed(init_seed)
        peft_model = get_peft_model(model, peft_config(kind, base.name, **config))
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if not parameter.requires_grad:
                    continue
                noise = torch.randn(parameter.shape, generator=generator)
                starts = ("lora_A", "lora_embedding_A", "ia3_", "ln_tuning_", "bitfit_", "bottleneck_down", "prompt_")
                starts += ("hada_w1", "hada_w2_a", "lokr_w2", "vera_lambda_d", "randlora_gamma")
                small = 0.02 if "lora_" in name else 0.1
                parameter.copy_(parameter + small * noise if any(start in name for start in starts) else 0.2 * noise)
        peft_model.save_pretrained(folder)
        if task is not None:
            document = json.loads((task / "task.json").read_text())
            document["data"] = {split: os.path.relpath(task / name, folder) for split, name in document["data"].items()}
            write_json(folder / "task.json", document)
        return folder

    return make


@pytest.fixture(scope="session")
def peft_case(
    tmp_path_factory: pytest.TempPathFactory,
    make_expert: MakeExpert,
    vit_base: Path,
    bert_base: Path,
    gpt2_base: Path,
    parity_task: Path,
    text_task: Path,
) -> PeftCase:
    """``peft_case(base's name, count, dtype, **config)``: an expert's model, and the first examples of its task.

    The model is PEFT's own, its factors alone require gradients; the examples come once together and once one by one.
    """
    bases = {"vit": vit_base, "bert": bert_base, "gpt2": gpt2_base}

    def make(
        name: str, count: int, dtype: torch.dtype = torch.float32, **config: object
    ) -> tuple[PeftModel, Examples, list[Batch]]:
        base, task = bases[name], open_task(parity_task if name == "vit" else text_task)
        folder = make_expert(tmp_path_factory.mktemp("case") / "expert", base, **config)
        model = PeftModel.from_pretrained(model_for(base).to(dtype), folder).eval()
        adapter = ("lora_", "ia3_", "ln_tuning_", "bitfit_", "bottleneck_", "prompt_encoder")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in adapter))
        examples, _ = task.examples("train", task.type.load_processor(str(base), None), model.config, limit=count)
        return model, examples, [examples.batch([index]) for index in range(count)]

    return make


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """Change the tensors of an expert's file where they lie."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"format": "pt"})
    return folder


def change_basis(tensors: dict[str, Tensor], basis: Tensor) -> None:
    """(B, A) → (BR, R⁻¹A): the same ΔW from other factors."""
    for key in [key for key in tensors if "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        tensors[key], tensors[other] = torch.linalg.solve(basis, tensors[key]), tensors[other] @ basis


def dense_deltas(expert: Expert) -> dict[str, Tensor]:
    """Module → ΔW = s·B·A as a dense float64 matrix: the slow reference for everything that merges."""
    deltas = {}
    for name in expert.modules:
        factors = expert.factors(name)
        deltas[name] = factors.scaling * factors.B.double() @ factors.A.double()
    return deltas


def merge(
    experts: Sequence[Expert],
    weights: Mapping[str, Sequence[float]] | Sequence[float],
    method: str = "interpolated",
    options: Mapping[str, Any] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> list[MergedModule]:
    """Every module of a merge."""
    chosen = open_method(method, options, seed)
    prepared = prepare(experts, weights, chosen, truncation=Truncation(rank, energy), **settings)
    return [prepared.module(name) for name in prepared.names]


def relative_difference(found: Tensor, reference: Tensor) -> float:
    """‖found − reference‖ / ‖reference‖, in float64; the numerator alone if the reference is zero."""
    difference = float((found.double() - reference.double()).norm())
    return difference / (float(reference.double().norm()) or 1.0)


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        output: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return output


def what_enters(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    examples: Examples,
    nll: Callable[[Any, Batch], Tensor],
    batches: Sequence[Sequence[int]],
) -> dict[str, Tensor]:
    """The marginals and Gram matrices of some layers of PEFT's model, over batches."""
    marginals = Marginals({name: model.get_submodule("base_model.model." + name) for name in layers})
    with marginals.recording():
        for indices in batches:
            nll(model, marginals.of(examples.batch(indices))).sum().backward()
    return marginals.means() | input_grams(layers, batches, examples.batch, lambda batch: nll(model, batch))


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in an empty folder: ``cli("rank", "--target", "X")``; a PimergeError stays an exception."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()

    def run(*arguments: object) -> Result:
        return runner.invoke(app, [str(argument) for argument in arguments])

    return run


@dataclass(frozen=True)
class Finished:
    """What a command left behind: exit status, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output as the one JSON document that it has to be."""
        return json.loads(self.out)


Shell = Callable[..., Finished]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    """Run ``pimerge`` in an empty folder as a shell does: ``shell("rank", "--target", "X").code``."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["pimerge", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Finished(int(ended.value.code or 0), *capfd.readouterr())

    return run


class Interrupt(KeyboardInterrupt):
    """Stands for a kill."""


@contextmanager
def unrestored(session: TuningSession, seed: int) -> Iterator[ExitStack]:
    """In place of ``TuningSession.restored``: what was trained stays in the base, to be looked at."""
    draw_head(session.loaded, seed)
    yield ExitStack()


def interrupted_after(steps: int | None) -> Track:
    """A progress report that kills the run after so many steps; None: when training is done."""

    @contextmanager
    def track(description: str, total: int, unit: str) -> Iterator[Advance]:
        done = 0

        def advance(step: int = 1, note: str = "") -> None:
            nonlocal done
            done += step
            if steps is not None and done >= steps:
                raise Interrupt

        yield advance
        if steps is None:
            raise Interrupt

    return track
