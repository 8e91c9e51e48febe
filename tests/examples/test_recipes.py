"""The recipes' own scripts and tasks on stand-ins: tiny models of the same architecture, data with the same columns."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from datasets import Sequence as Nested
from PIL import Image as PILImage
from transformers import (
    AutoConfig,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from pimerge.adapters.expert import open_expert
from pimerge.tasks.metrics.box_accuracy import box_of
from pimerge.tasks.task import open_task
from tests.support.bases import WORDS
from tests.support.image_text_bases import save_florence2
from tests.support.warm import run_script

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
ROWS = 8
TEXT, NUMBER = Value("string"), Value("int64")
Rows = list[dict[str, Any]]


def words(count: int) -> str:
    return " ".join(random.choices(WORDS, k=count))


def lettered(count: int, **types: Any) -> tuple[dict[str, Any], Rows]:
    """Questions with choices and their letters, as in ARC and CommonsenseQA."""
    features = {"id": TEXT, "question": TEXT, **types, "choices": Nested({"text": TEXT, "label": TEXT})}
    letters = list("ABCDE"[:count])
    rows = [
        {
            "id": str(index),
            "question": words(5) + "?",
            **dict.fromkeys(types, words(1)),
            "choices": {"text": [words(2) for _ in letters], "label": letters},
            "answerKey": letters[index % count],
        }
        for index in range(ROWS)
    ]
    return {**features, "answerKey": TEXT}, rows


def sciq() -> tuple[dict[str, Any], Rows]:
    names = ["question", "distractor3", "distractor1", "distractor2", "correct_answer", "support"]
    # some questions come without a paragraph
    return dict.fromkeys(names, TEXT), [{**{name: words(2) for name in names}, "support": ""} for _ in range(ROWS)]


def quail() -> tuple[dict[str, Any], Rows]:
    names = ["id", "context_id", "question_id", "domain", "context", "question", "question_type"]
    source = {"author": TEXT, "title": TEXT, "url": TEXT}
    features = {**dict.fromkeys(names, TEXT), "metadata": source, "answers": Nested(TEXT)}
    rows = [
        {
            **{name: words(3) for name in names},
            "context": words(30),
            "metadata": dict.fromkeys(source, "x"),
            "answers": [words(2) for _ in range(3)] + ["not enough information"],
            "correct_answer_id": index % 4,
        }
        for index in range(ROWS)
    ]
    return {**features, "correct_answer_id": Value("int32")}, rows


def glue(labels: Sequence[str], *texts: str) -> tuple[dict[str, Any], Rows]:
    features = {**dict.fromkeys(texts, TEXT), "label": ClassLabel(names=list(labels)), "idx": Value("int32")}
    rows = [{**{text: words(4) for text in texts}, "label": index % len(labels), "idx": index} for index in range(ROWS)]
    return features, rows


def images(classes: Sequence[str], size: int = 48, image: str = "image", label: str = "label", **more: Any) -> Any:
    features = {image: Image(), label: ClassLabel(names=list(classes)), **more}
    rows = []
    for index in range(ROWS):
        noise = PILImage.effect_noise((size, size), 20 + 40 * (index % len(classes)))
        mode = "L" if index == 1 else "RGB"  # real data sets contain a grey image now and then
        rows.append({image: noise.convert(mode), label: index % len(classes), **dict.fromkeys(more, 0)})
    return features, rows


def expressions() -> tuple[dict[str, Any], Rows]:
    """Referring expressions as in RefCOCO, with boxes as in COCO: left, top, width, height in pixels."""
    numbers = {"segmentation": Nested(Value("float32")), "bbox": Nested(Value("float32"))}
    features = {"question_id": TEXT, "image": Image(), "question": TEXT, "answer": Nested(TEXT), **numbers}
    rows = [
        {
            "question_id": str(index),
            "image": PILImage.effect_noise((80, 40), 50).convert("RGB"),
            "question": "Please carefully observe the area circled in the image.",
            "answer": [words(2), words(3)],
            "segmentation": [0.0] * 6,
            "bbox": [8.0, 10.0, 72.0, 30.0] if index else [0.5, 1.25, 20.0, 3.0],
            "iscrowd": 0,
            "file_name": f"COCO_train2014_{index}_0.jpg",
        }
        for index in range(ROWS)
    ]
    return {**features, "iscrowd": Value("int8"), "file_name": TEXT}, rows


def with_texts(*names: str) -> tuple[dict[str, Any], Rows]:
    """Images with texts about them."""
    rows = [
        {"image": PILImage.effect_noise((60, 40), 50).convert("RGB"), **{name: words(2) for name in names}}
        for _ in range(ROWS)
    ]
    return {"image": Image(), **dict.fromkeys(names, TEXT)}, rows


ENTAILMENT = ("entailment", "not_entailment")
# id on the Hub, subset, splits, columns and rows
DATA: dict[str, tuple[str, str | None, list[str], Callable[[], tuple[dict[str, Any], Rows]]]] = {
    "arc": ("allenai/ai2_arc", "ARC-Challenge", ["train", "validation", "test"], lambda: lettered(4)),
    "sciq": ("allenai/sciq", None, ["train", "validation", "test"], sciq),
    "commonsense-qa": (
        "tau/commonsense_qa",
        None,
        ["train", "validation", "test"],
        lambda: lettered(5, question_concept=TEXT),
    ),
    "quail": ("textmachinelab/quail", None, ["train", "validation", "challenge"], quail),
    "cifar100": (
        "uoft-cs/cifar100",
        None,
        ["train", "test"],
        lambda: images(["apple", "baby"], 32, "img", "fine_label", coarse_label=ClassLabel(names=["fruit", "people"])),
    ),
    "food101": ("ethz/food101", None, ["train", "validation"], lambda: images(["apple_pie", "waffles"])),
    "flowers": ("nelorth/oxford-flowers", None, ["train", "test"], lambda: images(["1", "10", "2"])),
    "eurosat": (
        "timm/eurosat-rgb",
        None,
        ["train", "validation", "test"],
        lambda: images(["Forest", "River"], 64, image_id=TEXT),
    ),
    "cars": ("tanganke/stanford_cars", None, ["train", "test"], lambda: images(["Audi S4", "BMW M3"])),
    "refcoco-plus": ("lmms-lab/RefCOCOplus", None, ["val", "testA", "testB"], expressions),
    "refcocog": ("lmms-lab/RefCOCOg", None, ["val", "test"], expressions),
    "vqa": ("merve/vqav2-small", None, ["validation"], lambda: with_texts("multiple_choice_answer", "question")),
    "captions": (
        "jxie/flickr8k",
        None,
        ["train", "validation", "test"],
        lambda: with_texts(*(f"caption_{index}" for index in range(5))),
    ),
    "sun397": ("tanganke/sun397", None, ["train", "test"], lambda: images(["abbey", "zoo"], 80)),
    **{
        name: ("nyu-mll/glue", name, splits, lambda labels=labels, texts=texts: glue(labels, *texts))
        for name, splits, labels, texts in [
            ("cola", ["train", "validation", "test"], ("unacceptable", "acceptable"), ("sentence",)),
            ("sst2", ["train", "validation", "test"], ("negative", "positive"), ("sentence",)),
            ("mrpc", ["train", "validation", "test"], ("not_equivalent", "equivalent"), ("sentence1", "sentence2")),
            ("qqp", ["train", "validation", "test"], ("not_duplicate", "duplicate"), ("question1", "question2")),
            (
                "mnli",
                ["train", "validation_matched", "validation_mismatched"],
                ("entailment", "neutral", "contradiction"),
                ("premise", "hypothesis"),
            ),
            ("qnli", ["train", "validation", "test"], ENTAILMENT, ("question", "sentence")),
            ("rte", ["train", "validation", "test"], ENTAILMENT, ("sentence1", "sentence2")),
        ]
    },
}


def write_data(task: Path) -> None:
    """Write a folder with the layout and the name of a task's data set on the Hub."""
    name, subset, splits, make = DATA[task.name]
    features, rows = make()
    repository = task / name
    inner = subset or "data"
    (repository / inner).mkdir(parents=True)
    for split in splits:
        file = repository / inner / f"{split}-00000-of-00001.parquet"
        Dataset.from_list(rows, features=Features(features)).to_parquet(str(file))
    paths = "".join(f"\n  - split: {split}\n    path: {inner}/{split}-*" for split in splits)
    configuration = f"- config_name: {subset or 'default'}\n  data_files:{paths}\n"
    (repository / "README.md").write_text(f"---\nconfigs:\n{configuration}---\n")


def t5(folder: Path, **config: Any) -> Path:
    """A T5 with a SentencePiece tokenizer."""
    letters = "abcdefghijklmnopqrstuvwxyz_:.?-12"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -3.0) for word in WORDS)]
    tokenizer = T5Tokenizer(vocab=[*pieces, *((letter, -5.0) for letter in letters)], extra_ids=2, model_max_length=512)
    tokenizer.save_pretrained(folder)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    special = {"vocab_size": len(tokenizer), "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(**sizes, **special, **config)).save_pretrained(folder)
    return folder


def vit(folder: Path) -> Path:
    """A ViT for images of 224 × 224 in patches of 32 × 32, without a head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    ViTModel(ViTConfig(**sizes, image_size=224, patch_size=32)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder)
    return folder


def florence(folder: Path) -> Path:
    """A Florence-2 with the position tokens of the real one."""
    save_florence2(folder, 128, 1000)
    return folder


BASES: dict[str, Callable[[Path], Path]] = {
    "flan-t5": lambda folder: t5(folder, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "vit": vit,
    "glue": t5,
    "florence": florence,
}
FEW = {"EPOCHS": "2", "FEW_EPOCHS": "3", "SEEDS": "0"}
RUNS: dict[str, dict[str, str]] = {
    "flan-t5": {**FEW, "TARGETS": "quail", "SHOTS": "2", "SEEDS": "0 1"},
    "vit": {**FEW, "TARGETS": "flowers", "SHOTS": "2"},
    "glue": {**FEW, "TARGETS": "rte", "TASKS": "cola mnli rte"},
    "florence": {**FEW, "TARGETS": "refcocog"},
}
METRICS = {"florence": "box-accuracy"}
METHODS = {
    "flan-t5": ["(base)", "nearest", "merged", "scratch", "learned"],
    "vit": ["(base)", "nearest", "merged", "head", "scratch", "uniform", "learned"],
    "glue": ["(base)", "nearest", "merged", "scratch", "pi-tuning"],
    "florence": ["(base)", "nearest", "merged", "scratch", "pi-tuning"],
}


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize("recipe", BASES)
def test_the_script_prints_its_table(recipe: str, tmp_path: Path, short: Path) -> None:
    random.seed(0)
    shutil.copytree(RECIPES, tmp_path / "recipes")
    folder = tmp_path / "recipes" / recipe
    tasks = {path.name for path in (folder / "tasks").iterdir()}
    for name in tasks:
        write_data(folder / "tasks" / name)
    base = BASES[recipe](tmp_path / "base")
    work = tmp_path / "work"
    code, printed = run_script(folder / "run.sh", [str(work)], short, BASE=str(base), **RUNS[recipe])
    assert code == 0, printed
    target = RUNS[recipe]["TARGETS"]
    assert {path.name for path in (work / "experts").iterdir()} == set(RUNS[recipe].get("TASKS", "").split() or tasks)
    table = [[part.strip() for part in line.split("|")[1:-1]] for line in (work / "table.md").read_text().splitlines()]
    assert table[0] == ["method", "shots", f"{target}, {METRICS.get(recipe, 'accuracy')}"]
    assert [row[0] for row in table[2:]] == [*METHODS[recipe], "its own expert, on all its data"]
    scores = {row["name"]: row for row in json.loads((work / target / "scores.json").read_text())["scores"]}
    assert all(row["examples"] == ROWS for row in scores.values())
    shots = RUNS[recipe].get("SHOTS", "all")
    metric = table[0][2].partition(", ")[2]
    runs = [scores[f"{METHODS[recipe][-1]}-{shots}-{seed}"] for seed in RUNS[recipe]["SEEDS"].split()]
    values = [100 * run["metrics"][metric]["value"] for run in runs]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    assert table[-2][1:] == [shots, f"{statistics.mean(values):.1f}{spread}"]
    assert (work / "table.md").read_text() in printed
    made = [*(work / "experts").iterdir(), *(work / target).glob("*-[0-9]")]
    assert len({open_expert(expert).sha256 for expert in made}) == len(made)


def examples_of(recipe: str, name: str, folder: Path) -> tuple[Any, Any, list[dict[str, Any]]]:
    """A task of a recipe on its stand-in: the training examples, the processor, the rows."""
    random.seed(0)
    shutil.copytree(RECIPES / recipe / "tasks" / name, folder / name)
    write_data(folder / name)
    task, base = open_task(folder / name), BASES[recipe](folder / "base")
    processor = task.type.load_processor(str(base), None)
    examples, _ = task.examples("train", processor, AutoConfig.from_pretrained(base))
    return examples, processor, list(task.rows("train")[0])


def test_the_order_of_the_choices_does_not_reveal_the_answer(tmp_path: Path) -> None:
    examples, _, rows = examples_of("flan-t5", "sciq", tmp_path)
    for text, row in zip(examples.texts, rows, strict=True):
        options = sorted([row["correct_answer"], *(row[f"distractor{place}"] for place in (1, 2, 3))])
        assert text.prompt == "\n".join([row["question"], "OPTIONS:", *(f"- {option}" for option in options), ""])
        assert list(text.answers) == options
        assert options[text.right] == row["correct_answer"]
    examples, _, rows = examples_of("flan-t5", "quail", tmp_path / "quail")
    options = [f"- {option}" for option in rows[5]["answers"]]
    assert examples.texts[5].prompt == "\n".join([rows[5]["question"], "OPTIONS:", *options, rows[5]["context"]])
    assert examples.texts[5].right == 5 % 4


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("cola", "cola sentence: {sentence}"),
        ("sst2", "sst2 sentence: {sentence}"),
        ("mrpc", "mrpc sentence1: {sentence1} sentence2: {sentence2}"),
        ("qqp", "qqp question1: {question1} question2: {question2}"),
        ("mnli", "mnli hypothesis: {hypothesis} premise: {premise}"),
        ("qnli", "qnli question: {question} sentence: {sentence}"),
        ("rte", "rte sentence1: {sentence1} sentence2: {sentence2}"),
    ],
)
def test_t5_gets_the_prompts_of_its_pretraining_and_answers_with_the_class_names(
    name: str, prompt: str, tmp_path: Path
) -> None:
    examples, _, rows = examples_of("glue", name, tmp_path)
    classes = DATA[name][3]()[0]["label"].names
    assert [text.prompt for text in examples.texts] == [prompt.format(**row) for row in rows]
    assert [text.answers[text.right] for text in examples.texts] == [classes[row["label"]] for row in rows]


def test_boxes_are_written_in_the_models_own_tokens_and_read_back(tmp_path: Path) -> None:
    examples, processor, rows = examples_of("florence", "refcocog", tmp_path)
    # left, top, right and bottom in thousandths of 80 × 40 pixels, the last ones at the border
    ends = ["<loc_6><loc_31><loc_256><loc_106>", *["<loc_100><loc_250><loc_999><loc_999>"] * (ROWS - 1)]
    for index, (text, row, end) in enumerate(zip(examples.texts, rows, ends, strict=True)):
        assert text.prompt == f"<CAPTION_TO_PHRASE_GROUNDING>{row['answer'][0]}"
        assert text.answers == (row["answer"][0] + end,)
        tokens = examples.tokens[index].answers[0]
        assert set(processor.tokenizer.convert_tokens_to_ids(re.findall("<.*?>", end))) <= set(tokens)
        assert box_of(examples.writing.decode(tokens)) == box_of(end)


@pytest.mark.parametrize("recipe", BASES)
def test_the_page_of_a_recipe_describes_its_script(recipe: str) -> None:
    title, *parts = (RECIPES / recipe / "README.md").read_text().split("\n## ")
    sections = dict(part.split("\n", 1) for part in parts)
    assert title.startswith("# ")
    assert list(sections) == ["What the paper reports", "The same", "Different", "Cost (estimated)"]
    script = (RECIPES / recipe / "run.sh").read_text()
    (paper,) = re.findall(r"arXiv (\d+\.\d+)", script)
    assert f"](https://arxiv.org/abs/{paper})" in sections["What the paper reports"]
    read = set(re.findall(r"\$\{([A-Z_]+):?-", script + (RECIPES / "pipeline.sh").read_text()))
    page = "".join(sections.values())
    assert set(re.findall(r"\b([A-Z_]+)='?[\w-]", page)) <= read
    rates = set(re.findall(r"\b\d+e-\d+\b", page))
    assert rates & set(re.findall(r"\b\d+e-\d+\b", script))
    cost = " ".join(sections["Cost (estimated)"].split())
    assert re.search(r"(hours|a day) in all|\d+ hours with", cost)


@pytest.mark.parametrize("recipe", ["flan-t5", "vit", "glue", "florence"])
def test_without_a_network_a_recipe_says_so_and_makes_nothing(recipe: str, tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "PYTHON": sys.executable}
    command = ["bash", str(RECIPES / recipe / "run.sh"), str(tmp_path / "work")]
    found = subprocess.run(command, env=os.environ | nowhere, capture_output=True, text=True, check=False)
    assert found.returncode == 3
    assert "error: http://127.0.0.1:9 cannot be reached" in found.stderr
    assert not (tmp_path / "work").exists()
