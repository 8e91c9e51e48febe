"""The family of figures: what every figure keeps to, and one that is added by its file alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from pimerge.core.errors import PimergeError
from pimerge.reporting import figures
from pimerge.reporting.figure import FIGURES, FigureData, FigureInputs
from tests.support.cli import Finished
from tests.support.tasks import write_json

ADDED = '''
"""How many characters a file has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pimerge.core.plugins import Option
from pimerge.reporting.figure import Figure, FigureData, FigureInputs
from pimerge.reporting.figures._canvas import new_figure

FACTOR = Option("factor", int, "Factor of the count.", lambda factor: factor > 0, "above 0")


@dataclass(frozen=True, kw_only=True)
class LengthData(FigureData):
    length: float


def read_text(inputs: FigureInputs) -> str:
    return inputs.ranking.read_text()


def collect(text: str, inputs: FigureInputs, *, factor: int) -> LengthData:
    return LengthData(length=factor * len(text))


def draw(data: LengthData):
    figure = new_figure(2, 2)
    figure.subplots().bar([0], [data.length])
    return figure


FIGURE = Figure(
    name="text-length",
    summary="How many characters a file has.",
    options={FACTOR: 2},
    data=LengthData,
    inputs=("ranking",),
    open=read_text,
    collect=collect,
    draw=draw,
)
'''


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure in a folder of its own."""
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "text_length.py").write_text(ADDED.lstrip())
    monkeypatch.setattr(figures, "__path__", [*figures.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "pimerge.reporting.figures.text_length", raising=False)
    monkeypatch.delattr(figures, "text_length", raising=False)


@pytest.mark.usefixtures("added")
def test_a_figure_is_added_by_its_file(shell: Callable[..., Finished], tmp_path: Path) -> None:
    (tmp_path / "ranking.json").write_text("12345")
    assert shell("plot", "--figures", "--json").document["text-length"] == "How many characters a file has."
    assert shell("plot", "text-length", "--json").document == {"figure": "text-length", "length": 10}
    (tmp_path / "ranking.json").unlink()  # from here on the data alone is read
    again = shell("plot", "text_length", "--data", "text-length.json", "--output", "again")
    assert again.code == 0, again.err
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "text-length.png").read_bytes()
    refused = shell("plot", "text-length", "--store", "s", "--force")
    assert (refused.code, "'pimerge plot text-length' does not read --store" in refused.err) == (3, True)


@pytest.mark.usefixtures("added")
def test_the_options_of_an_added_figure_are_checked() -> None:
    figure = FIGURES.load("text-length")
    assert figure.compute("abc", factor=3).length == 9
    assert figure.compute("abc", factor=None).length == 6
    with pytest.raises(PimergeError, match="--factor must be above 0; got 0"):
        figure.compute("abc", factor=0)
    with pytest.raises(PimergeError, match=r"'text-length' has no option --step\n.*it is for path"):
        figure.compute("abc", step=0.5)


@pytest.mark.parametrize("name", FIGURES.names())
def test_a_figure_reads_inputs_that_exist_and_has_data_of_its_own(name: str) -> None:
    figure = FIGURES.load(name)
    assert set(figure.inputs) <= {field.name for field in fields(FigureInputs)} - {"track", "note"}
    assert issubclass(figure.data, FigureData)
    assert [each.name for each in FIGURES if each.data is figure.data] == [name]
    assert figure.summary.endswith(".")


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"figure": "path", "length": 1}, "holds the data of the plot 'path'; expected data of 'text-length'"),
        ({"length": 1}, "does not hold the data of a plot"),
        ([1], "does not hold the data of a plot"),
        ({"figure": "text-length"}, "length: Field required"),
        ({"figure": "text-length", "length": "x"}, "length: Input should be a valid number"),
        ({"figure": "text-length", "length": 1, "width": 1}, "width: Unexpected keyword argument"),
    ],
)
def test_data_that_does_not_fit_is_refused(document: object, expected: str, tmp_path: Path) -> None:
    write_json(tmp_path / "data.json", document)  # type: ignore[arg-type]
    with pytest.raises(PimergeError) as error:
        FIGURES.load("text-length").read(tmp_path / "data.json")
    assert expected in str(error.value)
    assert "pimerge plot text-length" in str(error.value)


@pytest.mark.usefixtures("added")
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps({"figure": "text-length", "length": float("nan")}))
    with pytest.raises(PimergeError):
        FIGURES.load("text-length").read(tmp_path / "data.json")
