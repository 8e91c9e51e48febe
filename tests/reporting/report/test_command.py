"""``pimerge report`` as it is typed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pimerge.reporting.report.gathering import gather
from tests.support.cli import Shell


@pytest.fixture
def folder(tmp_path: Path, reported: Path, shell: Shell) -> Path:
    """The working folder, with what can be reported but the pool."""
    shutil.copytree(reported, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("experts"))
    return tmp_path


def test_one_file_of_the_folder(folder: Path, shell: Shell) -> None:
    result = shell("report", "--json")
    assert result.code == 0
    assert result.document == gather(Path()).model_dump(mode="json")
    assert "→ report.html" in result.err
    assert "half.json" in result.err
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    page = (folder / "report.html").read_bytes()
    assert shell("report", "--quiet").code == 0  # the same page again
    (folder / "report.html").write_bytes(b"<!DOCTYPE html>mine")
    refused = shell("report")
    assert (refused.code, refused.out) == (3, "")
    assert "--force" in refused.err
    again = shell("report", ".", "--force", "--quiet")
    assert (again.code, again.out, again.err) == (0, "", "")
    assert (folder / "report.html").read_bytes() == page
    assert shell("report", "--output", "pages/one.html").code == 0
    assert (folder / "pages" / "one.html").read_bytes() == (folder / "report.html").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["nowhere"], "'nowhere'"), (["empty"], "'empty'")],
)
def test_wrong_input_says_what_to_do(folder: Path, shell: Shell, arguments: list[str], expected: str) -> None:
    (folder / "empty").mkdir()
    result = shell("report", *arguments)
    assert (result.code, result.out) == (3, "")
    assert expected in result.err
    assert not (folder / "empty" / "report.html").exists()
