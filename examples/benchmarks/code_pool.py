"""Make a pool of tasks about program text, for a causal language model, from the standard library's sources.

    python examples/benchmarks/code_pool.py FOLDER

Writes ``FOLDER/base`` and ``FOLDER/tasks/NAME``; this trains an expert for each:

    pimerge tune --method scratch --target FOLDER/tasks/NAME --base FOLDER/base --output FOLDER/experts/NAME \\
        --modules q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj --fresh-rank 8 --epochs 8 --batch-size 32

Needs scikit-learn and a Python whose library has its ``test`` package; takes some minutes on one core. Every random
choice is seeded, so one version of Python always gives the same tasks; another version has other sources and rows.

The library's files are divided once, evenly over packages, tests and sizes, into three parts: ``pretrain`` trains
only the tokenizer and the base; ``train`` trains the tasks; ``test`` tests them. A snippet of a test file that is
also in the training rows of any task is left out. At the end a table shows, for each task, the accuracy of a logistic
regression on the bare base's features at the last token, and the share of the largest class.
"""

from __future__ import annotations

import ast
import io
import json
import random
import re
import shutil
import sys
import sysconfig
import textwrap
import time
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pimerge.models.loading import quiet_libraries

SEED = 0
TOKENS, VOCABULARY = 128, 3000
BATCH, STEPS = 16, 600
# files of each five of similar size in one stratum; the last few of a stratum get the first of these
PARTS = ("train", "test", "pretrain", "train", "pretrain")
ROWS = {"train": 1000, "test": 400}
LONGEST = 320  # characters of a snippet; about 100 tokens
# data instead of programs, programs that are broken on purpose, and packages that later versions lack
LEFT_OUT = re.compile(
    r"(site-packages|dist-packages|idlelib|lib2to3|distutils|encodings|pydoc_data|config-[^/]*|ensurepip)/|"
    r"_sysconfigdata|(^|/)(data|[a-z]*data|crashers|certdata)/|/bad|test/(test_lib2to3|test_distutils|tokenizedata)"
)
IS_TEST = re.compile(r"(^|/)tests?(/|_)|^test/")
# area of the library → its files, tests included
AREAS = {
    "asyncio": r"asyncio/|test/test_asyncio/",
    "email": r"email/|smtplib|mailbox|imaplib|test/test_(email|smtplib|mailbox|imaplib)",
    "importlib": r"importlib/|pkgutil|runpy|modulefinder|zipimport|test/test_(importlib|pkgutil|runpy|zipimport)",
    "numbers": r"_pydecimal|fractions|statistics|random|test/test_(decimal|fraction|statist|random|float|complex|math)",
    "web": r"(http|urllib|wsgiref)/|test/test_(http|url|wsgiref|robotparser)",
    "xml": r"(xml|html)/|plistlib|test/test_(xml|sax|minidom|pulldom|html|plistlib)",
    "unittest": r"unittest/|doctest|test/test_(unittest|doctest)",
    "processes": r"(multiprocessing|concurrent)/|subprocess|test/(_test_multi|test_(concurrent|subprocess|multi))",
    "ctypes": r"ctypes/|test/test_ctypes",
    "tkinter": r"(tkinter|turtledemo)/|turtle\.py|test/test_(tkinter|ttk|turtle)",
    "archives": r"(zipfile|tarfile|gzip|bz2|lzma|shutil)\.py|zipfile/|test/test_(zipfile|tarfile|gzip|bz2|lzma|shutil)",
    "dates": r"(_py)?datetime|calendar|_strptime|zoneinfo/|test/(datetimetester|test_(calendar|strptime|zone))",
}
# words that give the area away
TELLTALES = {
    "asyncio": r"async|await|loop|coro|future",
    "email": r"mail|smtp|imap|message|msg",
    "importlib": r"import|module|loader|finder|spec",
    "numbers": r"decimal|fraction|float|statistic|random|complex|math",
    "web": r"http|url|wsgi",
    "xml": r"xml|html|sax|dom|plist",
    "unittest": r"unittest|doctest|testcase|mock|suite",
    "processes": r"process|subprocess|executor|concurrent",
    "ctypes": r"ctypes|c_[a-z]+|POINTER",
    "tkinter": r"tkinter|\btk\b|ttk|turtle|widget",
    "archives": r"zip|tar|gz|bz2|lzma|archive",
    "dates": r"date|time|calendar|zone|tz",
}


@dataclass(frozen=True)
class Source:
    """A file of the library: ``code`` holds the numbers (from 1) of the lines that are code and not prose."""

    path: str
    area: str
    is_test: bool
    lines: tuple[str, ...]
    nodes: tuple[ast.AST, ...]
    code: frozenset[int]
    comments: tuple[str, ...]
    docstrings: tuple[str, ...]
    strings: tuple[str, ...]

    def line(self, number: int) -> str:
        """A line without its indentation; nothing where it is not code."""
        return self.lines[number - 1].strip() if number in self.code else ""


Row = tuple[str, str]
Recipe = Callable[[Source, random.Random], Iterable[Row]]


def main() -> None:
    """Build all of it and print the table."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/benchmarks/code_pool.py FOLDER")
    quiet_libraries()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name in ("base", "tasks"):
        shutil.rmtree(folder / name, ignore_errors=True)
    parts = read_library(Path(sysconfig.get_paths()["stdlib"]))
    print(", ".join(f"{part}: {len(sources)} files" for part, sources in parts.items()), flush=True)
    write_tasks(folder / "tasks", parts)
    pretrain_base(folder / "base", parts["pretrain"])
    print_table(folder)


# ---- the library's files


def read_library(folder: Path) -> dict[str, list[Source]]:
    """The files of each part: of every five of similar size in an area, two train, two pretrain and one tests."""
    strata: dict[tuple[str, bool], list[tuple[int, Source]]] = defaultdict(list)
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        source = None if LEFT_OUT.search(name) else read_source(name, path)
        if source is not None:
            strata[source.area, source.is_test].append((path.stat().st_size, source))
    if sum(len(files) for (_, is_test), files in strata.items() if is_test) < 100:
        sys.exit(f"{folder} lacks the library's tests: install them, or use a Python that has them")
    parts: dict[str, list[Source]] = {"pretrain": [], "train": [], "test": []}
    for stratum, files in sorted(strata.items(), key=lambda item: item[0]):
        draw = random.Random(f"{SEED} {stratum}")
        files.sort(key=lambda file: (-file[0], file[1].path))
        for start in range(0, len(files), len(PARTS)):
            group = [source for _, source in files[start : start + len(PARTS)]]
            draw.shuffle(group)
            for part, source in zip(PARTS, group, strict=False):
                parts[part].append(source)
    return parts


def read_source(name: str, path: Path) -> Source | None:
    """Parse one file; None if it is not plain ASCII Python or is nearly empty."""
    try:
        text = path.read_text(encoding="ascii")
        nodes = tuple(ast.walk(ast.parse(text)))
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (UnicodeDecodeError, SyntaxError, ValueError, tokenize.TokenError):
        return None
    lines = tuple(text.split("\n"))
    if len(lines) < 20:
        return None
    prose = {number for number, line in enumerate(lines, 1) if not line.strip() or line.lstrip().startswith("#")}
    docs = {node.value: None for node in nodes if isinstance(node, ast.Expr) and is_text(node.value)}  # in this order
    texts: list[Any] = [node for node in nodes if is_text(node)]
    for node in texts:
        if node in docs or node.end_lineno > node.lineno:
            prose.update(range(node.lineno, node.end_lineno + 1))
    return Source(
        path=name,
        area=next((area for area, pattern in AREAS.items() if re.match(pattern, name)), ""),
        is_test=bool(IS_TEST.search(name)),
        lines=lines,
        nodes=nodes,
        code=frozenset(range(1, len(lines) + 1)) - prose,
        comments=tuple(join_comments(tokens)),
        docstrings=tuple(line.strip() for doc in docs for line in doc.value.split("\n")),
        strings=tuple(node.value for node in texts if node not in docs),
    )


def is_text(node: ast.AST) -> bool:
    """Is it a string constant?"""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def join_comments(tokens: Iterable[tokenize.TokenInfo]) -> Iterator[str]:
    """The comments on lines of their own, up to three consecutive ones as one text."""
    block: list[str] = []
    last = 0
    for token in tokens:
        if token.type != tokenize.COMMENT or token.line.strip() != token.string:
            continue
        if block and (token.start[0] != last + 1 or len(block) == 3):
            yield " ".join(block)
            block = []
        block.append(token.string.strip("#!-=* \t"))
        last = token.start[0]
    if block:
        yield " ".join(block)


def windows(source: Source, size: int) -> Iterator[list[int]]:
    """Numbers of ``size`` consecutive lines of code; no line is used twice."""
    run: list[int] = []
    for number in range(1, len(source.lines) + 1):
        run = [*run, number] if number in source.code else []
        if len(run) == size:
            yield run
            run = []


def snippet(source: Source, numbers: Iterable[int]) -> str:
    """The lines without their common indentation."""
    return textwrap.dedent("\n".join(source.lines[number - 1].rstrip() for number in numbers)).strip()


# ---- the tasks: each recipe yields the rows of one file


def package(*areas: str) -> tuple[list[str], Recipe]:
    """Which part of the library are these lines from? Lines that contain a word of the answer are left out."""
    telling = re.compile("|".join(TELLTALES[area] for area in areas), re.IGNORECASE)

    def rows(source: Source, draw: random.Random) -> Iterator[Row]:
        if source.area in areas:
            for numbers in windows(source, 3):
                text = snippet(source, numbers)
                if not telling.search(text):
                    yield text, source.area

    return list(areas), rows


def statement(*keywords: str) -> tuple[list[str], Recipe]:
    """Which statement is it? Its keyword is cut off."""

    def rows(source: Source, draw: random.Random) -> Iterator[Row]:
        for number in sorted(source.code):
            keyword, _, rest = source.line(number).partition(" ")
            if keyword in keywords and rest.strip() and "#" not in rest:
                yield rest.strip(), keyword

    return list(keywords), rows


def operator(node_type: type[ast.AST], **signs: str) -> tuple[list[str], Recipe]:
    """Which operator stood at the question mark? ``signs``: the class of its node → the operator."""

    def rows(source: Source, draw: random.Random) -> Iterator[Row]:
        for node in source.nodes:
            if not isinstance(node, node_type) or node.lineno != node.end_lineno or node.lineno not in source.code:
                continue
            if isinstance(node, ast.Compare):
                left, kind, right = node.left, node.ops[0], node.comparators[0]
            else:
                left, kind, right = node.left, node.op, node.right  # type: ignore[attr-defined]
            sign = signs.get(type(kind).__name__)
            line = source.lines[node.lineno - 1]
            between = line[left.end_col_offset : right.col_offset]
            if sign and sign in between:
                masked = line[: left.end_col_offset] + between.replace(sign, "?", 1) + line[right.col_offset :]
                yield masked.strip(), sign

    return list(signs.values()), rows


def origin(source: Source, draw: random.Random) -> Iterator[Row]:
    """Comment, docstring, code or string, with neither signs nor quotes."""
    kinds = {
        "comment": [comment for comment in source.comments if len(comment) < 90],
        "docstring": source.docstrings,
        "code": [source.line(number) for number in sorted(source.code)],
        "string": [string for string in source.strings if " " in string.strip() and "\n" not in string],
    }
    for kind, texts in kinds.items():
        yield from ((text.strip("\"'# ."), kind) for text in texts if len(text) >= 15 and ">>>" not in text)


def indentation(source: Source, draw: random.Random) -> Iterator[Row]:
    """How deep was this line?"""
    for number in sorted(source.code):
        line = source.lines[number - 1]
        depth, rest = divmod(len(line) - len(line.lstrip()), 4)
        if not rest and line.count("(") == line.count(")"):
            yield line.strip(), "4+" if depth >= 4 else str(depth)


def returns(source: Source, draw: random.Random) -> Iterator[Row]:
    """Does the function that begins like this return something? The lines shown contain no return."""
    for node in source.nodes:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith(("test", "setUp", "tearDown", "__init__")):
            continue
        numbers = [number for number in range(node.lineno, (node.end_lineno or 0) + 1) if number in source.code]
        text = snippet(source, numbers[:4])
        if len(numbers) > 2 and not re.search(r"return|yield", text):
            values = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return)]
            yield text, "something" if any(value is not None for value in values) else "nothing"


def next_word(source: Source, draw: random.Random) -> Iterator[Row]:
    """Which keyword does the line after these begin with?"""
    for numbers in windows(source, 4):
        word = re.match(r"\w*", source.line(numbers[3]))
        if word and word[0] in NEXT:
            yield snippet(source, numbers[:3]), word[0]


def name_form(source: Source, draw: random.Random) -> Iterator[Row]:
    """In which style is the name at the question mark written?"""
    for number in sorted(source.code):
        line = re.sub(r"\"[^\"]*\"|'[^']*'", '""', source.line(number))
        found = [(name, form) for name in re.findall(r"\b[A-Za-z]\w+", line) if (form := form_of(name))]
        if found and line.count("(") == line.count(")") and not line.startswith(("import", "from", "class", "def")):
            name, form = draw.choice(sorted(set(found)))
            yield re.sub(rf"\b{name}\b", "?", line), form


def form_of(name: str) -> str:
    """The form of an identifier; nothing for a keyword, a single word or a mixture."""
    forms = {
        "snake_case": r"[a-z0-9]+(_[a-z0-9]+)+",
        "CamelCase": r"([A-Z][a-z0-9]+){2,}",
        "mixedCase": r"[a-z]+([A-Z][a-z0-9]+)+",
        "UPPER_CASE": r"[A-Z0-9]+(_[A-Z0-9]+)+",
    }
    return next((form for form, pattern in forms.items() if re.fullmatch(pattern, name)), "")


def tested(source: Source, draw: random.Random) -> Iterator[Row]:
    """Are these lines from a test?"""
    for numbers in windows(source, 4):
        text = snippet(source, numbers)
        if not re.search(r"test|assert|fail|support|check", text, re.IGNORECASE):
            yield text, "test" if source.is_test else "library"


def tested_comment(source: Source, draw: random.Random) -> Iterator[Row]:
    """Is this comment from a test?"""
    for comment in source.comments:
        if len(comment) > 30 and not re.search(r"test|assert|fail|check", comment, re.IGNORECASE):
            yield comment, "test" if source.is_test else "library"


def arguments(source: Source, draw: random.Random) -> Iterator[Row]:
    """How many arguments does the call have?"""
    for node in source.nodes:
        if isinstance(node, ast.Call) and node.lineno == node.end_lineno and node.lineno in source.code:
            text = source.lines[node.lineno - 1][node.col_offset : node.end_col_offset]
            count = len(node.args) + len(node.keywords)
            if "*" not in text and ".assert" not in text and text.startswith(tuple("abcdefghijklmnopqrstuvwxyz_")):
                yield text, "4+" if count >= 4 else str(count)


def parameters(source: Source, draw: random.Random) -> Iterator[Row]:
    """How many parameters does the function have?"""
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef):
            text, given = source.line(node.lineno), node.args
            count = sum(len(names) for names in (given.posonlyargs, given.args, given.kwonlyargs))
            if text.startswith("def ") and text.endswith(":") and not (given.vararg or given.kwarg):
                yield text[4:-1], "4+" if count >= 4 else str(count)


def value(source: Source, draw: random.Random) -> Iterator[Row]:
    """What kind of value is assigned at the question mark? The next line follows."""
    for node in source.nodes:
        if isinstance(node, ast.Assign) and node.lineno == node.end_lineno and node.lineno in source.code:
            kind = VALUES.get(type(node.value).__name__, "")
            if isinstance(node.value, ast.Constant):
                kind = {"str": "string", "int": "number", "bool": "flag", "NoneType": "none"}.get(
                    type(node.value.value).__name__, ""
                )
            target = source.lines[node.lineno - 1][node.col_offset : node.value.col_offset].rstrip("( ")
            if kind and source.line(node.lineno + 1):
                yield f"{target} ?\n{source.line(node.lineno + 1)}", kind


def length(source: Source, draw: random.Random) -> Iterator[Row]:
    """How long is the line, without its indentation?"""
    for number in sorted(source.code):
        size = len(source.line(number))
        if 10 <= size < 70:
            yield source.line(number), ("10-24", "25-39", "40-54", "55-69")[(size - 10) // 15]


def swapped_lines(source: Source, draw: random.Random) -> Iterator[Row]:
    """Have these four lines been swapped in pairs?"""
    for numbers in windows(source, 4):
        lines = snippet(source, numbers).split("\n")
        corrupt = draw.random() < 0.5
        if len(lines) == len(set(lines)):
            yield "\n".join(in_pairs(lines) if corrupt else lines).strip(), "swapped" if corrupt else "whole"


def replaced_token(source: Source, draw: random.Random) -> Iterator[Row]:
    """Has a third of the tokens of these two lines been replaced by others of the file?"""
    blocks = [snippet(source, numbers) for numbers in windows(source, 2)]
    return replaced(blocks, r"\w+|[^\w\s]", draw)


def replaced_word(source: Source, draw: random.Random) -> Iterator[Row]:
    """Has a third of the comment's words been replaced by others of the file's comments?"""
    return replaced(source.comments, r"\w+", draw)


def replaced(texts: Sequence[str], token: str, draw: random.Random) -> Iterator[Row]:
    """Half of the texts unchanged, the others with a third of their tokens replaced by random ones of the file."""
    stock = [found for text in texts for found in re.findall(token, text)]
    for text in texts:
        places = list(re.finditer(token, text))
        if len(places) < 6:
            continue
        if draw.random() < 0.5:
            yield text, "whole"
            continue
        changed = text
        for place in sorted(draw.sample(places, len(places) // 3), key=lambda found: -found.start()):
            others = [other for other in draw.sample(stock, min(len(stock), 8)) if other != place[0]]
            if others:
                changed = changed[: place.start()] + others[0] + changed[place.end() :]
        if changed != text:
            yield changed, "replaced"


def swapped_words(source: Source, draw: random.Random) -> Iterator[Row]:
    """Have the words of the comment been swapped in pairs?"""
    for comment in source.comments:
        words = comment.split()
        corrupt = draw.random() < 0.5
        if len(words) >= 6:
            yield " ".join(in_pairs(words) if corrupt else words), "swapped" if corrupt else "whole"


def in_pairs(items: Sequence[str]) -> list[str]:
    """Second, first, fourth, third, …; an odd last one stays."""
    return [item for start in range(0, len(items), 2) for item in reversed(items[start : start + 2])]


def changed(task: tuple[list[str], Recipe], change: Callable[[str], str]) -> tuple[list[str], Recipe]:
    """The same task on changed texts."""
    labels, recipe = task

    def rows(source: Source, draw: random.Random) -> Iterator[Row]:
        return ((change(text), label) for text, label in recipe(source, draw))

    return labels, rows


def spaceless(text: str) -> str:
    """The text without any white space."""
    return re.sub(r"\s+", "", text)


NEXT = ["if", "return", "for", "def", "else", "self"]
VALUES = {"Call": "call", "List": "container", "Tuple": "container", "Dict": "container"}
PACKAGE_B = package("web", "xml", "unittest", "processes")
FLOW = statement("import", "def", "class", "return", "if", "for")
SWAPPED, REPLACED = ["whole", "swapped"], ["whole", "replaced"]

POOL: dict[str, tuple[list[str], Recipe]] = {
    # label shift: the same question with disjoint answers
    "package-a": package("asyncio", "email", "importlib", "numbers"),
    "package-b": PACKAGE_B,
    "package-c": package("ctypes", "tkinter", "archives", "dates"),
    "statement-a": FLOW,
    "statement-b": statement("raise", "assert", "with", "while", "except", "elif"),
    "operator-compare": operator(ast.Compare, Eq="==", NotEq="!=", Lt="<", Gt=">", In="in", Is="is"),
    "operator-compute": operator(ast.BinOp, Add="+", Sub="-", Mult="*", Mod="%", BitOr="|", BitAnd="&"),
    # covariate shift: two of those on changed texts
    "package-b-spaceless": changed(PACKAGE_B, spaceless),
    "statement-a-upper": changed(FLOW, str.upper),
    # domain shift: the same question about code and about comments
    "tested-code": (["library", "test"], tested),
    "tested-comment": (["library", "test"], tested_comment),
    "replaced-code": (REPLACED, replaced_token),
    "replaced-comment": (REPLACED, replaced_word),
    "swapped-code": (SWAPPED, swapped_lines),
    "swapped-comment": (SWAPPED, swapped_words),
    # task shift: other questions about code
    "origin": (["comment", "docstring", "code", "string"], origin),
    "indentation": (["0", "1", "2", "3", "4+"], indentation),
    "returns": (["nothing", "something"], returns),
    "next-word": (NEXT, next_word),
    "name-form": (["snake_case", "CamelCase", "mixedCase", "UPPER_CASE"], name_form),
    "arguments": (["0", "1", "2", "3", "4+"], arguments),
    "parameters": (["0", "1", "2", "3", "4+"], parameters),
    "value": (["call", "string", "number", "container", "flag", "none"], value),
    "length": (["10-24", "25-39", "40-54", "55-69"], length),
}


def write_tasks(folder: Path, parts: Mapping[str, Sequence[Source]]) -> None:
    """``task.json`` and the rows of both splits of every task; no test row is a training row of any task."""
    train = {name: draw_rows(name, "train", parts["train"], frozenset()) for name in POOL}
    seen = frozenset(text for rows in train.values() for text, _ in rows)
    for name, (labels, _) in POOL.items():
        (folder / name).mkdir(parents=True)
        for split, rows in {"train": train[name], "test": draw_rows(name, "test", parts["test"], seen)}.items():
            lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
            (folder / name / f"{split}.jsonl").write_text("".join(lines))
        document = {
            "type": "text-classification",
            "data": {"train": "train.jsonl", "test": "test.jsonl"},
            "labels": labels,
            "description": f"{name}, from Python {sysconfig.get_python_version()}'s standard library",
        }
        (folder / name / "task.json").write_text(json.dumps(document, indent=2) + "\n")


def draw_rows(name: str, split: str, sources: Sequence[Source], seen: frozenset[str]) -> list[Row]:
    """A split's rows: equally many of each class, spread over the files, without repetition, in random order.

    The largest class has at most one and a half times as many rows as the smallest.
    """
    labels, recipe = POOL[name]
    draw = random.Random(f"{SEED} {name} {split}")
    turns: dict[str, list[tuple[int, float, str]]] = {label: [] for label in labels}
    known = set(seen)
    for source in sources:
        found = [row for row in recipe(source, draw) if 2 <= len(row[0]) <= LONGEST]
        draw.shuffle(found)
        count: Counter[str] = Counter()
        for text, label in found:
            if label in turns and text not in known:
                known.add(text)
                turns[label].append((count[label], draw.random(), text))  # a file's second row comes after all firsts
                count[label] += 1
    size = min(ROWS[split] // len(labels), 3 * min(len(found) for found in turns.values()) // 2)
    rows = [(text, label) for label, found in turns.items() for _, _, text in sorted(found)[:size]]
    draw.shuffle(rows)
    return rows


# ---- the base


def pretrain_base(folder: Path, sources: Sequence[Source]) -> None:
    """A tokenizer and a small Llama, trained to predict the next token of the ``pretrain`` part."""
    torch.manual_seed(SEED)
    texts = ["\n".join(source.lines) for source in sources]
    held = len(texts) // 20
    order = random.Random(SEED).sample(range(len(texts)), len(texts))
    tokenizer = train_tokenizer([texts[index] for index in order[held:]])
    tokenizer.save_pretrained(folder)
    held_out = chunks(tokenizer, [texts[index] for index in order[:held]])[:256]
    train = chunks(tokenizer, [texts[index] for index in order[held:]])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"base: {size / 1e6:.2f} M parameters, {len(train)} chunks of {TOKENS} tokens")
    print(f"held-out loss before: {held_out_loss(model, held_out):.3f}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS, pct_start=0.1)
    start = time.perf_counter()
    step = 0
    while step < STEPS:
        for batch in torch.randperm(len(train)).split(BATCH):
            loss = next_token_loss(model, train[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 100 == 0:
                print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
            if step == STEPS:
                break
    print(f"held-out loss after {STEPS} steps: {held_out_loss(model, held_out):.3f}", flush=True)
    model.save_pretrained(folder)


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        model_max_length=TOKENS,
        padding_side="right",
    )


def chunks(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """(chunks × tokens): pieces of eight lines without their common indentation, an end token after each."""
    pieces = []
    for text in texts:
        lines = [line for line in text.split("\n") if line.strip()]
        pieces += [textwrap.dedent("\n".join(lines[start : start + 8])) for start in range(0, len(lines), 8)]
    end = tokenizer.eos_token_id
    stream = [token for ids in tokenizer(pieces, verbose=False)["input_ids"] for token in [*ids, end]]
    return torch.tensor(stream[: len(stream) // TOKENS * TOKENS]).view(-1, TOKENS)


def next_token_loss(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Cross-entropy of each token but the first, in nats."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """The mean over all of them."""
    return float(np.mean([next_token_loss(model, batch).item() for batch in tokens.split(64)]))


# ---- the table


def print_table(folder: Path) -> None:
    """Each task with the accuracy of a logistic regression on the bare base's features."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base").eval()
    print(f"{'task':<20} {'classes':>7} {'train':>6} {'test':>6} {'logistic':>9} {'majority':>9}")
    for name, (labels, _) in POOL.items():
        splits = {}
        for split in ("train", "test"):
            lines = (folder / "tasks" / name / f"{split}.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            answers = [row["label"] for row in rows]
            splits[split] = last_features(model, tokenizer, [row["text"] for row in rows]), answers
        regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        accuracy = regression.fit(*splits["train"]).score(*splits["test"])
        answers = splits["test"][1]
        majority = max(Counter(answers).values()) / len(answers)
        sizes = f"{len(labels):>7} {len(splits['train'][1]):>6} {len(answers):>6}"
        print(f"{name:<20} {sizes} {accuracy:>9.1%} {majority:>9.1%}", flush=True)


@torch.no_grad()
def last_features(model: Any, tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """(texts × hidden): the base's output at the last token of each text."""
    features = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt")
        batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
        hidden = model.model(**batch).last_hidden_state
        last = batch["attention_mask"].sum(1) - 1
        features.append(hidden[torch.arange(len(last)), last].numpy())
    return np.concatenate(features)


if __name__ == "__main__":
    main()
