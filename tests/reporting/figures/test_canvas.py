"""The files of a picture."""

from __future__ import annotations

from matplotlib.figure import Figure

from pimerge.reporting.figures._canvas import new_figure, pictures


def test_the_last_digits_of_a_layout_do_not_change_the_files() -> None:
    def draw(shift: float) -> Figure:
        figure = new_figure(3, 2)
        figure.set_layout_engine("none")  # which gives other last digits in other processes
        axes = figure.add_axes((0.2 + shift, 0.2, 0.6 - shift, 0.6))
        axes.plot([0, 1], [1, 0])
        return figure

    expected = pictures(lambda: draw(0.0))
    assert pictures(lambda: draw(1e-13)) == expected
    assert pictures(lambda: draw(0.01)) != expected
