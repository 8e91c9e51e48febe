"""Build everything in this folder from scikit-learn's digits: data, tasks, base model, pool of experts.

    python -m examples.multimodal.make [FOLDER]

in a clone of the repository; needs ``pip install scikit-learn``. Every random choice is seeded; it takes about ten
minutes on one core, a third of them for the base.

The scans are divided as in ``examples/digits``: ``pretrain`` trains only the base; ``train`` the pool; ``few`` and
``draws`` the few-shot targets; ``test`` tests every task. The base is a Florence-2 of 0.3 million parameters, trained
to caption scans ("a scan of a three") and to fill gaps in sentences: numbers in order, and the pool's questions and
answers, never side by side. So it can recognise a digit and count, but knows the answer to no question.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features, Image, Value
from jinja2 import Template
from PIL import Image as PILImage
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    PreTrainedTokenizerFast,
)

import pimerge
from examples.digits.cut import ATTRIBUTION, inverted, png
from examples.digits.make import divide, jittered, read_scans
from pimerge.checkpoints.base import find_base
from pimerge.models.loading import quiet_libraries
from pimerge.tuning.options import TrainingOptions

SEED = 0
ONES = (  # noqa: SIM905
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
DIGITS = ONES[:10]
YES_NO = ["yes", "no"]
LOOPS = {0: "one", 6: "one", 8: "two", 9: "one"}

STEPS, BATCH = 700, 48
WIDTH, POSITIONS = 64, 96
PIECES = 17  # the vision tower turns an image of 16 × 16 into 4 × 4 positions and their mean
CAPTION, OCR = "<CAPTION>", "<OCR>"  # Florence-2's own prompts
WRITTEN_OUT = {CAPTION: "What does the image describe?", OCR: "What is the text in the image?"}  # by its processor

LORA = {"fresh_kind": "lora", "fresh_rank": 4, "fresh_alpha": 8.0, "fresh_modules": ("q_proj", "v_proj", "qkv")}
BOTTLENECK = {"fresh_kind": "bottleneck", "fresh_rank": 4}

Row = dict[str, Any]
Parts = Mapping[str, Sequence[Row]]  # split → rows


@dataclass(frozen=True)
class Spec:
    """A task: its data and its question.

    Attributes:
        files: of the splits ``train`` and ``test``.
        prompt: Jinja2 template over the columns.
        column: of the answer.
        labels: the classes; none where the answer is free.
        image: the column of the images; None for a task of texts.
        epochs: passes over the data in which an expert learns it.
    """

    files: tuple[str, str]
    prompt: str
    column: str
    labels: Sequence[str] = ()
    image: str | None = "image"
    epochs: float = 12

    def document(self, description: str) -> dict[str, Any]:
        """The content of ``task.json``."""
        train, test = (f"../../data/{name}" for name in self.files)
        images = {"image": self.image} if self.image else {}
        answers: dict[str, Any] = {"answer": f"{{{{ {self.column} }}}}"}
        if self.labels:
            answers = {"labels": list(self.labels)}
        return {
            "type": "image-text-to-text",
            "data": {"train": train, "test": test},
            "columns": images | ({"label": self.column} if self.labels else {}),
            "prompt": self.prompt,
            **answers,
            "description": description,
        }


# files with some of the digits: which digits, and from which splits
SOME = {
    "inverted": (DIGITS[:7], ("train", "test")),
    "pair": (["three", "eight"], ("train", "test")),
    "unseen": (DIGITS[7:], ("draws", "test")),
}
SCANS = ("scans.train.parquet", "scans.test.parquet")
INVERTED = ("inverted.train.parquet", "inverted.test.parquet")
PAIR = ("pair.train.parquet", "pair.test.parquet")
SUM = ("sum.train.jsonl", "sum.test.jsonl")
PARITY = ("parity.train.jsonl", "parity.test.jsonl")
MORE = ("more.train.jsonl", "more.test.jsonl")
EVEN = "Is this digit even?"
# v: an image with a fixed question; l: text only; vl: both matter
POOL: dict[str, Spec] = {
    "v-digit": Spec(SCANS, OCR, "digit", DIGITS),
    "v-inverted": Spec(INVERTED, OCR, "digit", DIGITS[:7], "inverted"),
    "v-three-or-eight": Spec(PAIR, OCR, "digit", ["three", "eight"], epochs=30),
    "l-sum": Spec(SUM, "What is {{ first }} plus {{ second }}?", "sum", image=None, epochs=30),
    "l-parity": Spec(PARITY, "Is {{ number }} even?", "even", YES_NO, None, epochs=50),
    "l-more": Spec(MORE, "Is {{ first }} more than {{ second }}?", "more", YES_NO, None, epochs=20),
    "vl-even": Spec(SCANS, EVEN, "even", YES_NO),
    "vl-caption": Spec(SCANS, CAPTION, "caption"),
    "vl-fits": Spec(SCANS, "Does the caption fit? {{ claim }}", "fits", YES_NO),
    "vl-loops": Spec(SCANS, "How many loops?", "loops", ["none", "one", "two"]),
}
TWINS = ("v-digit", "l-parity", "vl-even", "vl-caption")  # also have a bottleneck
DRAWS = ("scans.draws.parquet", "scans.test.parquet")
UNSEEN = ("unseen.draws.parquet", "unseen.test.parquet")
NUMBERS = ("parity.draws.jsonl", "parity.test.jsonl")
# tasks without an expert, from which a few examples are sampled
TARGETS: dict[str, Spec] = {
    "v-inverted-unseen": Spec(UNSEEN, OCR, "digit", DIGITS[7:], "inverted"),
    "l-odd-or-even": Spec(NUMBERS, "Is {{ number }} odd or even?", "odd", ["odd", "even"], None),
    "vl-inverted-even": Spec(DRAWS, EVEN, "even", YES_NO, "inverted"),
}


def main() -> None:
    """Build all of it."""
    quiet_libraries()
    torch.set_num_threads(1)  # faster than two threads for a model this small, and the same numbers on any machine
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name in ("data", "tasks", "base", "experts"):
        shutil.rmtree(folder / name, ignore_errors=True)
    scans = scan_rows()
    data = data_of(scans)
    for name, rows in data.items():
        write_rows(folder / "data" / name, rows)
    for name, spec in (POOL | TARGETS).items():
        write_json(folder / "tasks" / name / "task.json", spec.document(f"{modality(name)}: {spec.prompt}"))
    pretrain(folder / "base", scans["pretrain"], asked_and_answered(data), STEPS)
    for name in POOL:
        train_expert(folder, name, name, LORA)
        if name in TWINS:
            train_expert(folder, name, f"{name}-b", BOTTLENECK)


def modality(name: str) -> str:
    """The modality of a task, from the beginning of its name."""
    return {"v": "vision", "l": "language", "vl": "vision-language"}[name.partition("-")[0]]


def in_words(number: int) -> str:
    """A number from 0 to 999.

    >>> in_words(7), in_words(40), in_words(47), in_words(300), in_words(312)
    ('seven', 'forty', 'forty seven', 'three hundred', 'three hundred twelve')
    """
    if number < len(ONES):
        return ONES[number]
    unit, name = (100, f"{ONES[number // 100]} hundred") if number >= 100 else (10, TENS[number // 10 - 2])
    return name + (f" {in_words(number % unit)}" if number % unit else "")


def scan_rows() -> dict[str, list[Row]]:
    """Part of the scans → its scans, with the answers to all questions about each."""
    images, digits = read_scans()
    pixels = np.stack([np.asarray(image) for image in images]).astype(float)
    ink, places = pixels.sum((1, 2)), np.arange(8)
    middle = (pixels.sum(1) * places).sum(1) / ink
    spread = (pixels.sum(1) * (places - middle[:, None]) ** 2).sum(1) / ink
    bold, wide = ink > np.median(ink), spread > np.median(spread)
    random = np.random.default_rng(SEED)
    parts: dict[str, list[Row]] = {}
    for i, (digit, part) in enumerate(zip(digits.tolist(), divide(digits), strict=True)):
        claimed = digit if random.random() < 0.5 else (digit + int(random.integers(1, 10))) % 10
        row = {
            "image": images[i],
            "inverted": inverted(images[i], i),
            "number": i,
            "digit": DIGITS[digit],
            "even": YES_NO[digit % 2],
            "loops": LOOPS.get(digit, "none"),
            "caption": f"a {'bold' if bold[i] else 'thin'} {'wide' if wide[i] else 'narrow'} {DIGITS[digit]}",
            "claim": scan_of(DIGITS[claimed]),
            "fits": YES_NO[claimed != digit],
        }
        parts.setdefault(part, []).append(row)
    return parts


def scan_of(digit: str) -> str:
    """The caption that the base is trained on."""
    return f"a scan of {'an' if digit == 'eight' else 'a'} {digit}"


def data_of(scans: Parts) -> dict[str, list[Row]]:
    """Every data file: its name → rows."""
    parts = {"train": scans["train"], "draws": [*scans["few"], *scans["draws"]], "test": scans["test"]}
    files: dict[str, list[Row]] = {}
    for split, rows in parts.items():
        files[f"scans.{split}.parquet"] = list(rows)
        for name, (digits, splits) in SOME.items():
            if split in splits:
                files[f"{name}.{split}.parquet"] = [row for row in rows if row["digit"] in digits]
    random = np.random.default_rng(SEED)
    every: dict[str, tuple[list[Row], dict[str, int]]] = {
        "sum": ([summed(a, b) for a in range(90) for b in range(10)], {"train": 600, "test": 300}),
        "more": ([compared(a, b) for a in range(100) for b in range(100) if a != b], {"train": 600, "test": 300}),
        "parity": ([divided(number) for number in range(1000)], {"train": 200, "draws": 100, "test": 300}),
    }
    for name, (rows, sizes) in every.items():
        order = iter(random.permutation(len(rows)).tolist())
        for split, size in sizes.items():
            files[f"{name}.{split}.jsonl"] = [rows[next(order)] for _ in range(size)]
    return files


def summed(first: int, second: int) -> Row:
    """A sum in words."""
    return {"first": in_words(first), "second": in_words(second), "sum": in_words(first + second)}


def compared(first: int, second: int) -> Row:
    """Two numbers in words, and whether the first is more."""
    return {"first": in_words(first), "second": in_words(second), "more": YES_NO[first < second]}


def divided(number: int) -> Row:
    """A number in words, and whether two divides it."""
    return {"number": in_words(number), "even": YES_NO[number % 2], "odd": ["even", "odd"][number % 2]}


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A parquet file with Image features, or JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    kinds = {int: Value("int64"), str: Value("string")}
    features = Features({name: kinds.get(type(value), Image()) for name, value in rows[0].items()})
    columns = {
        name: [{"bytes": png(row[name]), "path": None} if isinstance(feature, Image) else row[name] for row in rows]
        for name, feature in features.items()
    }
    table = pa.table(columns, schema=features.arrow_schema)
    table = table.replace_schema_metadata({**table.schema.metadata, b"attribution": ATTRIBUTION.encode()})
    pq.write_table(table, path, compression="zstd", compression_level=19)


def write_json(path: Path, document: Any) -> None:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def asked_and_answered(data: Parts) -> list[list[str]]:
    """The questions and the answers of every task's training data, separately."""
    found = []
    for spec in (POOL | TARGETS).values():
        rows, question = data[spec.files[0]], Template(spec.prompt)
        asked = [] if spec.prompt in WRITTEN_OUT else [question.render(row) for row in rows]
        found.append(asked + [row[spec.column] for row in rows])
    return found


def count(random: np.random.Generator) -> str:
    """Four numbers in order, up or down, one to three apart."""
    step, most = int(random.integers(1, 4)), 100 if random.random() < 0.8 else 1000
    first = int(random.integers(most - 3 * step))
    numbers = [in_words(first + i * step) for i in range(4)]
    return ", ".join(numbers if random.random() < 0.7 else numbers[::-1])


def with_gap(sentence: str, random: np.random.Generator) -> str:
    """A sentence with one to three of its words masked."""
    words = sentence.split()
    size = int(random.integers(1, min(3, len(words)) + 1))
    first = int(random.integers(len(words) - size + 1))
    return " ".join([*words[:first], "<mask>", *words[first + size :]])


def tokenizer_of(sentences: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer like BART's, in which the words of some sentences are single tokens."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=[*special, AddedToken("<mask>", lstrip=True, special=True), "<image>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        vocab_size=2000,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special, strict=True)),
        mask_token="<mask>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
    )


def processor_of(tokenizer: PreTrainedTokenizerFast) -> Florence2Processor:
    """Florence-2's processor, for images of 16 × 16."""
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(
        size={"height": 16, "width": 16},
        do_center_crop=False,
        resample=PILImage.Resampling.BICUBIC,
        image_mean=half,
        image_std=half,
        image_seq_length=PIECES,
    )
    return Florence2Processor(images, tokenizer)


def fresh_base(tokenizer: PreTrainedTokenizerFast) -> Florence2ForConditionalGeneration:
    """A Florence-2 with two vision stages and a BART of two layers on each side."""
    sides = {"layers": 2, "attention_heads": 4, "ffn_dim": 2 * WIDTH}
    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    text = {
        "model_type": "bart",
        "vocab_size": len(tokenizer),
        "d_model": WIDTH,
        "dropout": 0.0,
        "max_position_embeddings": POSITIONS,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
        **{f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in sides.items()},
        **tokens,
    }
    vision = {
        "depths": [1, 1],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [WIDTH // 2, WIDTH],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "window_size": 4,
        "drop_path_rate": 0.0,
        "mlp_ratio": 2.0,
        "projection_dim": WIDTH,
        "max_temporal_embeddings": 1,
        "max_position_embeddings": 4,
    }
    config = Florence2Config(vision_config=vision, text_config=text, image_token_id=tokenizer.image_token_id, **tokens)
    return Florence2ForConditionalGeneration(config)


def pretrain(folder: Path, scans: Sequence[Row], texts: Sequence[Sequence[str]], steps: int) -> None:
    """Train a base on captions, and on filling gaps in counted numbers and in the texts of each task; save it."""
    torch.manual_seed(SEED)
    random = np.random.default_rng(SEED)
    captions = [scan_of(row["digit"]) for row in scans]
    tokenizer = tokenizer_of([*chain(*texts), *map(in_words, range(1000)), ",", *captions, *WRITTEN_OUT.values()])
    processor = processor_of(tokenizer)
    model = fresh_base(tokenizer).train()
    shown = processor(
        text=[CAPTION] * len(scans), images=[row["image"].convert("RGB") for row in scans], return_tensors="pt"
    )
    taught = answers_of(tokenizer, captions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        chosen = torch.randint(len(scans), (BATCH,))
        images = {name: value[chosen] for name, value in shown.items()}
        images["pixel_values"] = jittered(images["pixel_values"])
        whole = [count(random) for _ in range(BATCH // 2)] + [
            random.choice(texts[int(task)]).item() for task in random.integers(len(texts), size=BATCH // 2)
        ]
        gaps = tokenizer([with_gap(sentence, random) for sentence in whole], padding=True, return_tensors="pt")
        loss = model(**images, labels=taught[chosen]).loss + model(**gaps, labels=answers_of(tokenizer, whole)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"base: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def answers_of(tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str]) -> Tensor:
    """The tokens that the model should write; −100 after the end of a sentence."""
    found = tokenizer(sentences, padding=True, return_tensors="pt")
    labels: Tensor = found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)
    return labels


def train_expert(folder: Path, task: str, name: str, form: Mapping[str, Any]) -> None:
    """``pimerge tune --method scratch`` on one task; all experts of a kind start from one init."""
    result = pimerge.tune(
        method="scratch",
        target=folder / "tasks" / task,
        base=find_base("base", None, folder),  # named 'base' in the adapters, wherever the folder is
        options=TrainingOptions(epochs=POOL[task].epochs, lr=1e-2, batch_size=32, label_smoothing=0.0, **form),
        device="cpu",
        output=folder / "experts" / name,
    )
    outcome = result.outcome
    print(f"{name}: held-out loss {outcome.held_out_loss:.3f} after {outcome.epochs:.0f} epochs", flush=True)


if __name__ == "__main__":
    main()
