"""Examples per second and peak memory of embedding and tuning models of real shapes with random weights.

    python examples/benchmarks/large_models.py [--shape flan-t5-large 7b] [--examples 512] [--length 256] [--answer 16]

A model is made from its config, filled with random numbers and saved into a temporary folder (14 GB for the 7B shape
in bfloat16), so that it is treated like a downloaded one. On a task with ``--examples`` prompts of ``--length``
tokens and answers of ``--answer`` tokens, a fresh LoRA is tuned (``scratch``), then the weights of three LoRAs
(``learned``), and the LoRA is embedded: by ``rules``, or, if the rules fail their check, by a ``loop`` over single
examples. The rate is measured between the first and the last report of progress, without loading and warm-up. Peak
memory is that of the GPU, or without one that of the process.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from pimerge.adapters.compatibility import check_expert
from pimerge.adapters.expert import open_expert
from pimerge.checkpoints.base import find_base
from pimerge.cli.console import print_table
from pimerge.core.progress import Advance
from pimerge.embedding.embed_expert import EmbedOptions, EmbedOutcome, embed_expert
from pimerge.embedding.store import Store
from pimerge.embedding.store_schema import EmbedSettings
from pimerge.models.loading import Bases, quiet_libraries, resolve_device, resolve_dtype
from pimerge.tasks.task import open_task
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.tune import tune

FLAN = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1}
# type of task, model, config, the modules that are adapted
SHAPES: dict[str, tuple[str, type[PreTrainedModel], Any, tuple[str, ...]]] = {
    "flan-t5-large": (
        "seq2seq",
        T5ForConditionalGeneration,
        T5Config(vocab_size=32128, d_model=1024, d_ff=2816, num_layers=24, num_heads=16, **FLAN, **SPECIAL),
        ("q", "v"),
    ),
    "7b": ("causal-lm", LlamaForCausalLM, LlamaConfig(bos_token_id=2, **SPECIAL), ("q_proj", "v_proj")),
    "tiny": (
        "seq2seq",
        T5ForConditionalGeneration,
        T5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **FLAN, **SPECIAL),
        ("q", "v"),
    ),
    "tiny-causal": (
        "causal-lm",
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=512,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=2,
            **SPECIAL,
        ),
        ("q_proj", "v_proj"),
    ),
}
WORDS = [f"w{index}" for index in range(500)]
RANK, EXPERTS = 16, 3


def main() -> None:
    """Print one row for each shape and stage."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["flan-t5-large", "7b"])
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--answer", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16, help="batch size of tuning")
    parser.add_argument("--batch-tokens", type=int, default=None, help="tokens per batch of embedding")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    quiet_libraries()
    rows = []
    for shape in arguments.shape:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(shape, Path(folder), arguments)
    print_table(["shape", "parameters", "stage", "examples/s", "tokens/s", "peak memory"], rows)


def measure(shape: str, folder: Path, arguments: argparse.Namespace) -> list[list[str]]:
    """The rows of one shape."""
    kind, _, _, modules = SHAPES[shape]
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    parameters = save_base(shape, folder / "base", device, dtype, arguments.length + arguments.answer + 2)
    task = open_task(save_task(kind, folder / "task", arguments))
    base = find_base(str(folder / "base"), None, folder)
    rows = []

    def stage(name: str, examples: int, run: Callable[[Stopwatch], Any]) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        watch = Stopwatch(device)
        done = run(watch)
        if isinstance(done, EmbedOutcome) and done.fisher:
            name = f"{name}, {done.fisher.route}"
        rate = watch.rate() * examples
        peak = (
            torch.cuda.max_memory_allocated(device)
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        tokens = rate * (arguments.length + arguments.answer)
        rows.append([shape, f"{parameters / 1e6:.0f} M", name, f"{rate:.3g}", f"{tokens:.3g}", f"{peak / 1e9:.2f} GB"])

    options = TrainingOptions(
        epochs=1, batch_size=arguments.batch_size, holdout=0, lr=1e-4, fresh_rank=RANK, fresh_modules=modules
    )
    where = {"device": arguments.device, "dtype": arguments.dtype}
    first = folder / "experts" / "0"
    stage(
        "tune scratch",
        arguments.batch_size,
        lambda watch: tune(
            method="scratch", target=task, base=base, output=first, options=options, track=watch, **where
        ),
    )
    copies = [shutil.copytree(first, first.with_name(str(place))) for place in range(1, EXPERTS)]
    experts = [open_expert(path, base.reference) for path in (first, *copies)]
    stage(
        f"tune learned, {EXPERTS} experts",
        arguments.batch_size,
        lambda watch: tune(
            experts,
            method="learned",
            target=task,
            base=base,
            output=folder / "tuned",
            options=options,
            track=watch,
            **where,
        ),
    )
    store, settings = Store(folder / "embeddings.json"), EmbedSettings(max_examples=arguments.examples)
    own, bases = check_expert(experts[0]), Bases(device, dtype)
    stage(
        "embed",
        1,
        lambda watch: embed_expert(
            experts[0], own, store, settings, bases, EmbedOptions(arguments.batch_tokens), track=watch
        ),
    )
    return rows


class Stopwatch:
    """A progress tracker that records the time of each step.

    Args:
        device: waited for before the time is taken.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[float, int]] = []

    @contextmanager
    def __call__(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        """See :data:`pimerge.core.progress.Track`."""

        def advance(steps: int = 1, note: str = "") -> None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            if steps:
                self.marks.append((time.perf_counter(), steps))

        yield advance

    def rate(self) -> float:
        """Steps per second, counted from the end of the first."""
        if len(self.marks) < 2:
            raise SystemExit("one batch holds all examples: pass more --examples, or smaller batches")
        return sum(steps for _, steps in self.marks[1:]) / (self.marks[-1][0] - self.marks[0][0])


def save_base(shape: str, folder: Path, device: torch.device, dtype: torch.dtype, length: int) -> int:
    """Save a model of random weights and a tokenizer of words; return its number of parameters."""
    _, kind, config, _ = SHAPES[shape]
    with torch.device("meta"):
        model = kind(config).to(dtype)
    model.to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    names = {name: index for index, name in enumerate(["<pad>", "</s>", "<s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(names, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=length,
    ).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def save_task(kind: str, folder: Path, arguments: argparse.Namespace) -> Path:
    """Prompts and answers of one length."""
    random.seed(0)
    folder.mkdir()
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(arguments.examples):
            row = {"text": text(arguments.length), "answer": text(arguments.answer)}
            file.write(json.dumps(row) + "\n")
    document = {"type": kind, "data": "train.jsonl", "prompt": "{{ text }}", "answer": "{{ answer }}"}
    (folder / "task.json").write_text(json.dumps(document))
    return folder


def text(count: int) -> str:
    """A text of a number of words."""
    return " ".join(random.choices(WORDS, k=count))


if __name__ == "__main__":
    main()
