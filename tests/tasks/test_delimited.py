"""CSV and TSV as they are in the wild: every cell is the text that was written."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pimerge.tasks.delimited import read_delimited
from pimerge.tasks.task import open_task
from tests.support.tasks import write_json
from tests.support.text_rows import problem_of

WORDS = ["007", "1.10", "null", "None", "NA", "nan", "n/a", "TRUE", "1e3", " spaced ", "2020-01-01", "-1"]


def task_of(folder: Path, content: bytes, file: str = "d.csv", **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(content)
    data = {"train": file} | {name: fields.pop(name) for name in ("delimiter", "encoding", "quoting") if name in fields}
    document = {"type": "text-classification", "data": data, "labels": ["neg", "pos"], **fields}
    write_json(folder / "task.json", document)
    return folder


def read(folder: Path) -> tuple[list[str], list[int]]:
    rows, labels = open_task(folder).rows("train")
    return list(rows["text"]), labels


def refused(folder: Path) -> str:
    return problem_of(lambda: open_task(folder).rows("train"))


cells = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\r\n\t"), max_size=8)


@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=6))
def test_what_the_csv_module_writes_is_read(rows: list[tuple[str, str]]) -> None:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("a", "b"), *rows])
    table = read_delimited(io.StringIO(file.getvalue(), newline=""), "d.csv", ",", csv.QUOTE_MINIMAL)
    assert [(row["a"] or "", row["b"] or "") for row in table.to_pylist()] == rows


def test_words_and_numbers_stay_texts(tmp_path: Path) -> None:
    content = "text,label\n" + "".join(f"{word},pos\n" for word in WORDS)
    assert read(task_of(tmp_path, content.encode()))[0] == WORDS


@pytest.mark.parametrize("file", ["d.tsv", "d.tsv.gz", "D.TSV"])
def test_quotes_in_tsv_are_characters(tmp_path: Path, file: str) -> None:
    content = b'text\tlabel\n"good film\tpos\nbad "film\tneg\nit is" nice\tpos\n'
    content = gzip.compress(content) if file.endswith(".gz") else content
    texts, labels = read(task_of(tmp_path, content, file))
    assert (texts, labels) == (['"good film', 'bad "film', 'it is" nice'], [1, 0, 1])


def test_quotes_in_tsv_enclose_cells_if_the_task_says_so(tmp_path: Path) -> None:
    content = b'text\tlabel\n"a ""b""\tc"\tpos\n'
    assert read(task_of(tmp_path, content, "d.tsv", quoting="minimal")) == (['a "b"\tc'], [1])


@pytest.mark.parametrize(
    ("fields", "content"),
    [
        ({"delimiter": ";"}, "text;label\ncafé, good;pos\n".encode()),
        ({"delimiter": "|", "encoding": "latin-1"}, "text|label\ncafé, good|pos\n".encode("latin-1")),
        ({"quoting": "none", "delimiter": ";"}, "text;label\ncafé, good;pos\n".encode()),
        ({"delimiter": "\t", "file": "d.txt"}, "text\tlabel\ncafé, good\tpos\n".encode()),
        ({}, b"\xef\xbb\xbf" + 'label,text\r\npos,"café, good"\r\n'.encode()),
        ({}, 'label,text\rpos,"café, good"\r'.encode()),
        ({}, 'text,label\n"café, good",pos\n'.encode("utf-16")),
    ],
)
def test_formats_of_spreadsheets(tmp_path: Path, fields: dict[str, str], content: bytes) -> None:
    assert read(task_of(tmp_path, content, **fields)) == (["café, good"], [1])


def test_a_text_file_needs_a_delimiter(tmp_path: Path) -> None:
    message = refused(task_of(tmp_path, b"text\tlabel\na\tpos\n", "d.txt"))
    assert "'d.txt' ends in '.txt'" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "text,label\ncaf\xe9,pos\n".encode("latin-1"),
            "not encoded in utf-8: line 2 has the byte 0xe9\n  → save it as",
        ),
        (b"text;label\ngood;pos\n", 'name the delimiter in data: "delimiter": ";"'),
        (b"", "is empty"),
        (b"text,label\n", "is empty"),
        (b'text,label\n"good film,pos\nbad,neg\n', "the quotes in"),
        (b'text,label\n"good" film,pos\n', "the quotes in"),
        (b"text,label\na,pos\nb\nc,d,neg\n\ne\n", "3 of 4 rows of"),
        (b"text,text,label\na,b,pos\n", "names the column 'text' 2 times"),
        (b" \n", "is empty"),
        (b"good film,pos\nbad film,neg\n", "its first line seems to be a row"),
        (b"text,label\n,pos\n", "no text in 1 row: 0"),
        (b"text,label\npos,good film\nneg,bad film\n", "the column 'text' holds names of classes"),
    ],
)
def test_what_cannot_be_read_is_named_once(tmp_path: Path, content: bytes, words: str) -> None:
    message = refused(task_of(tmp_path, content))
    assert message.count(words) == 1, message


def test_rows_of_another_length_are_listed(tmp_path: Path) -> None:
    content = b"text,label\na,pos\nb\nc,d,neg\n\ne\nf,pos\ng\n"
    assert "have 1, 3 cells, and its first line has 2: rows 1-3, 5 (from 0)" in refused(task_of(tmp_path, content))


@pytest.mark.parametrize(
    "fields", [{"delimiter": ";;"}, {"encoding": "latin-99"}, {"quoting": "some"}, {"delimiter": '"'}]
)
def test_a_format_that_does_not_exist_is_refused(tmp_path: Path, fields: dict[str, str]) -> None:
    assert repr(next(iter(fields.values()))).strip("'") in refused(task_of(tmp_path, b"text,label\na,pos\n", **fields))


def test_a_delimiter_is_for_text_files(tmp_path: Path) -> None:
    content = b'{"text": "a", "label": "pos"}\n'
    assert "no file is CSV or TSV" in refused(task_of(tmp_path, content, "d.jsonl", delimiter=";"))


@pytest.mark.parametrize(
    "content",
    [b"\x1f\x8b\x08 no gzip", gzip.compress(b"text,label\na,pos\n" * 99, mtime=0)[:-9], b"a,b\n"],
    ids=["no gzip", "cut off", "plain text"],
)
def test_broken_gzip_is_named(tmp_path: Path, content: bytes) -> None:
    assert "cannot be read" in refused(task_of(tmp_path, content, "d.csv.gz"))


def test_columns_that_are_declared_numbers_are_numbers(tmp_path: Path) -> None:
    content = b"text,label,n,x\na,pos,007,1.5\nb,neg,,2\n"
    rows, _ = open_task(task_of(tmp_path, content, numbers=["n", "x"])).rows("train")
    assert rows.to_dict()["n"] == [7, None]
    assert rows.to_dict()["x"] == [1.5, 2.0]


def test_texts_that_are_no_numbers_are_listed(tmp_path: Path) -> None:
    content = b"text,label,n\na,pos,many\nb,neg,few\nc,neg,3\n"
    message = refused(task_of(tmp_path, content, numbers=["n", "m"]))
    assert "2 texts that are no numbers: 'many', 'few' (rows 0-1, from 0)" in message
    assert "no column 'm', which numbers names" in message


def test_the_hash_of_a_task_knows_the_format(tmp_path: Path) -> None:
    content = b"text,label\na,pos\n"
    hashes = {
        open_task(task_of(tmp_path / str(number), content, **fields)).sha256()
        for number, fields in enumerate(({}, {"quoting": "none"}, {"encoding": "latin-1"}, {"numbers": ["text"]}))
    }
    assert len(hashes) == 4


def test_the_format_is_kept_beside_an_output(tmp_path: Path) -> None:
    task = open_task(task_of(tmp_path / "task", b"text;label\na;pos\n", delimiter=";"))
    (tmp_path / "other").mkdir()
    document = task.document_for(tmp_path / "other")
    write_json(tmp_path / "other" / "task.json", json.loads(json.dumps(document)))
    assert open_task(tmp_path / "other").sha256() == task.sha256()
    assert read(tmp_path / "other") == (["a"], [1])
