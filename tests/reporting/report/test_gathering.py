"""What a report says is what the documents say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pimerge.core.errors import PimergeError
from pimerge.reporting.figure import FIGURES
from pimerge.reporting.report import tables
from pimerge.reporting.report.document import Report, Section, Table
from pimerge.reporting.report.gathering import gather
from pimerge.reporting.report.page import page
from tests.support.documents import EVIL, SCORES
from tests.support.numerics import small
from tests.support.tasks import write_json


@pytest.fixture(scope="module")
def report(reported: Path) -> Report:
    return gather(reported)


def section(report: Report, name: str) -> Section:
    return next(each for each in report.sections if each.name == name)


def column(table: Table, name: str) -> list[str]:
    return [row[table.columns.index(name)].text for row in table.rows]


def test_the_pool_is_what_inspect_says(report: Report) -> None:
    pool = section(report, "pool")
    (table,) = pool.tables
    assert column(table, "expert") == [EVIL, "a", "broken"]
    assert column(table, "kind")[:2] == ["lora", "lora"]
    assert column(table, "merges with")[:2] == ["1", "1"]
    assert any("broken" in problem for problem in pool.problems)
    assert ("the experts' Fisher information", "pimerge embed ./experts") in pool.missing


def test_the_ranking(report: Report) -> None:
    (table,) = section(report, "ranking").tables
    assert column(table, "expert") == [*SCORES, "d"]
    assert [row[2].value for row in table.rows] == [*SCORES.values(), None]
    assert column(table, "expected gain, points") == ["+25.0", "+50.0", "+12.5", "–"]
    assert column(table, "verdict")[1] == "selected"
    assert table.numbers[:6] == [True, False, True, True, True, True]


def test_outputs_with_mean_weights(report: Report) -> None:
    outputs = section(report, "outputs")
    (row,) = outputs.tables[0].rows
    assert [cell.text for cell in row] == [
        "tuned",
        "tune learned",
        "a",
        f"b 0.50, {EVIL} 0.50",
        "3",
        "1,234",
        "0.5000",
        "–",
        "25.00%",
        "–",
    ]
    assert [text.title for text in outputs.texts] == ["The model card of tuned"]
    assert outputs.missing == [("a merged expert", "pimerge merge --method uniform")]


def test_scores_comparison_and_plots(report: Report) -> None:
    (table,) = section(report, "scores").tables
    assert [cell.text for cell in table.rows[0]] == [
        EVIL,
        "75.0%",
        "50.0% – 100.0%",
        "0.500",
        "0.250 – 0.750",
        "12",
        "",
    ]
    compared = section(report, "comparison")
    assert compared.sentences == ["comparison.json: none"]
    assert len(compared.tables[0].rows) == 2 * (3 + 9)
    plots = section(report, "plots")
    assert [picture.file for picture in plots.pictures] == ["gain.svg"]
    assert ("pimerge plot gain") not in [command for _, command in plots.missing]
    missing = {command for _, command in plots.missing}
    assert missing == {f"pimerge plot {name}" for name in FIGURES.names() if name != "gain"}
    assert any("half.json" in problem for problem in plots.problems)


def test_a_folder_with_little_says_what_makes_the_rest(tmp_path: Path, reported: Path) -> None:
    shutil.copy(reported / "ranking.json", tmp_path)
    report = gather(tmp_path)
    commands = [command for each in report.sections for _, command in each.missing]
    for command in ("embed", "merge", "tune", "eval", "compare", "plot"):
        assert any(each.startswith(f"pimerge {command}") for each in commands)


@pytest.mark.parametrize("names", [[], ["notes.json"]])
def test_an_empty_folder_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write_json(tmp_path / name, ["of", "something", "else"])
    with pytest.raises(PimergeError, match=r"there is nothing in .*\n.*pimerge embed"):
        gather(tmp_path)


def test_documents_that_do_not_fit_are_problems_of_their_section(tmp_path: Path) -> None:
    write_json(tmp_path / "ranking.json", {"candidates": [], "selected": 1, "measure": 2})
    write_json(tmp_path / "scores.json", {"target": "a", "split": "test", "scores": [{}]})
    write_json(tmp_path / "comparison.json", {"runs": [], "lines": [], "conclusion": 3})
    write_json(tmp_path / "graph.json", {"figure": "graph"})
    write_json(tmp_path / "embeddings.json", {"experts": 5})
    (tmp_path / "tuned").mkdir()
    write_json(tmp_path / "tuned" / "pimerge.json", {})
    report = gather(tmp_path)
    assert [bool(each.problems) for each in report.sections] == [True] * 6
    assert "has no picture beside it" in section(report, "plots").problems[0]


def test_long_tables_are_cut_and_say_so(monkeypatch: pytest.MonkeyPatch, reported: Path) -> None:
    monkeypatch.setattr(tables, "MOST_ROWS", 2)
    report = gather(reported)
    (table,) = section(report, "ranking").tables
    assert (len(table.rows), table.left_out) == (2, 2)
    assert "2 more rows are not shown" in page(report, reported)


def test_the_page_has_no_markup_of_others(report: Report, reported: Path) -> None:
    text = page(report, reported)
    assert text == page(gather(reported), reported)
    assert "<img src=x" not in text
    assert text.count("<script>") == 1
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "work &amp; play" in text
    assert "http://" not in text
    assert "https://" not in text


def test_a_large_picture_gives_way(report: Report, reported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(reported, tmp_path / "copy")
    (folder / "gain.svg").write_text("<svg>" + "x" * 5_000_000)
    assert "gain.svg is left out: the page would be too large" in page(report, folder)
    (folder / "gain.png").write_bytes(b"\x89PNG")
    assert 'src="data:image/png;base64,' in page(report, folder)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a document."""
    found = [path] if path else []
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        found += places(value, (*path, key))
    return found


VALUES = [None, "x", "", [], {}, [1], -1, 10**400, float("nan"), float("inf"), True, {"a": 1}]


@settings(small, max_examples=40)
@given(data=st.data())
def test_whatever_stands_in_a_document_the_report_is_made(reported: Path, data: st.DataObject) -> None:
    names = [
        "ranking.json",
        "scores.json",
        "comparison.json",
        "gain.json",
        "tuned/pimerge.json",
        "tuned/coefficients.json",
    ]
    name = data.draw(st.sampled_from(names))
    document = json.loads((reported / name).read_text())
    *path, last = data.draw(st.sampled_from(places(document)))
    inner = document
    for key in path:
        inner = inner[key]
    inner[last] = data.draw(st.sampled_from(VALUES))
    with TemporaryDirectory() as folder:
        shutil.copytree(reported, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("experts"))
        (Path(folder) / name).write_text(json.dumps(document))
        assert "</html>" in page(gather(Path(folder)), Path(folder))
