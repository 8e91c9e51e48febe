"""Standard output and standard error that cannot be written, or have an old encoding."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from pimerge.cli import app, console, streams
from pimerge.core.errors import PimergeError


def test_a_full_disk_is_said_in_words() -> None:
    full = streams.Results(io.BufferedWriter(io.FileIO("/dev/full", "w")), encoding="utf-8")
    full.write("a result")
    with pytest.raises(PimergeError, match="cannot write to standard output: No space left on device"):
        full.flush()
    full.flush()  # the rest goes nowhere, so that the interpreter can end


def test_a_closed_reader_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    pipe = streams.Results(os.fdopen(writer, "wb"), encoding="utf-8")
    os.close(reader)
    pipe.write("a result")
    with pytest.raises(SystemExit) as ended:
        pipe.flush()
    assert ended.value.code == streams.EXIT_BROKEN_PIPE


def test_remarks_that_cannot_be_written_change_nothing() -> None:
    full = streams.Remarks(io.BufferedWriter(io.FileIO("/dev/full", "w")), encoding="utf-8", write_through=True)
    full.write("a remark")
    full.flush()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_old_encodings_get_plain_characters(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams.prepare_streams()
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding, errors="pimerge", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    console.print_line("0.1 ± 0.2 → café ✓")
    lines = {
        "ascii": "0.1 +/- 0.2 -> caf\\xe9 \\u2713\n",
        "cp1252": "0.1 ± 0.2 -> café \\u2713\n",
        "utf-8": "0.1 ± 0.2 → café ✓\n",
    }
    assert buffer.getvalue().decode(encoding) == lines[encoding]
    buffer.seek(0)
    console.print_json(document := {"é": "✓ 😀"})
    assert json.loads(buffer.getvalue()[: buffer.tell()].decode(encoding)) == document


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [(">&-", 3, "standard output: it is closed"), (">/dev/full", 3, "No space left on device"), ("2>&-", 0, "")],
)
def test_streams_of_a_shell(redirected: str, code: int, said: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = f"exec '{sys.executable}' -m pimerge --help {redirected}"
    ended = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.returncode == code


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OSError(5, "Input/output error", "rows.csv"), "cannot read or write 'rows.csv': Input/output error"),
        (OSError(116, "Stale file handle"), "cannot read or write a file: Stale file handle"),
        (OSError(24, "Too many open files", "a"), "raise the limit (ulimit -n)"),
        (MemoryError(), "the memory is full"),
    ],
)
def test_errors_of_the_system_have_words(
    raised: BaseException, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        raise raised

    monkeypatch.setattr(app, "app", run)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 3
    assert said in capsys.readouterr().err
