"""Files with random changes: their rows are read or refused in words, and nothing else is raised."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pimerge.core.errors import PimergeError
from pimerge.tasks.task import open_task
from tests.support.text_rows import write_parquet

CSV = 'text,label\n"a ""b""\n",pos\ncafé,neg\n\n'.encode()
LINES = b'{"text":"a","label":"pos"}\n{"text":"\\u00e9","label":null,"x":[1,{"y":2}]}\n'
FILES = {
    "d.csv": CSV,
    "d.tsv": b'text\tlabel\n"a\tpos\nb\tneg\n',
    "d.json": b'[{"text":"a","label":"pos"},{"text":"b","label":1}]',
    "d.ndjson": LINES,
    "d.csv.gz": gzip.compress(CSV),
    "d.jsonl.gz": gzip.compress(LINES),
}
PIECES = [
    b'"',
    b",",
    b"\t",
    b"\n",
    b"\r",
    b"\0",
    b"{",
    b"]",
    b"null",
    b"NaN",
    b"1e999",
    b"\\ud800",
    b"\xff\xfe",
    b"\xe9",
]
KINDS = {"text-classification": {}, "token-classification": {"tokens": "text", "labels": "label"}}
Change = tuple[float, int, bytes]
changes = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.sampled_from(PIECES)), min_size=1, max_size=4)


def changed(content: bytes, edits: list[Change]) -> bytes:
    """Insert a piece at a share of the length, in place of some bytes."""
    for share, removed, piece in edits:
        place = int(share * len(content))
        content = content[:place] + piece + content[place + removed :]
    return content


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=changes, kind=st.sampled_from(list(KINDS)), skip=st.booleans())
@pytest.mark.parametrize("name", [*FILES, "d.parquet"])
def test_a_changed_file_is_read_or_refused(
    tmp_path: Path, name: str, edits: list[Change], kind: str, skip: bool
) -> None:
    if name not in FILES:
        write_parquet(tmp_path / name, [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    content = FILES.get(name) or (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(changed(content, edits))
    document = {"type": kind, "data": {"train": name}, "labels": ["neg", "pos"], "skip_unlabelled": skip}
    (tmp_path / "task.json").write_text(json.dumps({**document, "columns": KINDS[kind]}))
    with suppress(PimergeError):
        rows, labels = open_task(tmp_path).rows("train")
        assert len(rows) == len(labels)
