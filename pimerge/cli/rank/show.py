"""What ``pimerge rank`` prints: a ranking, the measures, the pool's gains, and why an expert has its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pimerge.cli.console import note, print_json, print_table
from pimerge.ranking.measure import MEASURES

if TYPE_CHECKING:
    from pimerge.adapters.ranking_document import Candidate, Ranking
    from pimerge.ranking.rank import Explanation

SHOWN = 12
GAIN = "expected gain, points"


def print_ranking(ranking: Ranking, k: int | None, quiet: bool) -> None:
    """Print the candidates, best first, those that are not comparable, and the bare base; then remarks.

    Args:
        k: how many were asked for; None for auto.
    """
    gains = any(candidate.gain is not None for candidate in ranking.candidates)
    scored = not gains or any(candidate.score != candidate.gain for candidate in ranking.candidates)
    rows = []
    for place, candidate in enumerate(ranking.candidates, 1):
        mark = "selected" if candidate.name in ranking.selected else "" if candidate.helps else "not expected to help"
        score = f"{candidate.score:.4f} ± {(candidate.high - candidate.low) / 2:.4f}"
        rows.append(
            [
                str(place),
                candidate.name,
                *([score] if scored else []),
                *([f"{candidate.scale:g}", _points(candidate)] if gains else []),
                mark,
            ]
        )
    columns = ["", "expert", *([ranking.measure] if scored else []), *(["scale", GAIN] if gains else []), ""]
    blank = ["–"] * (len(columns) - 3)
    rows += [["–", other.name, *blank, f"not comparable: {other.reason}"] for other in ranking.not_comparable]
    if scored and ranking.base_score is not None:
        rows.append(["–", "(base)", f"{ranking.base_score:.4f}", *blank[1:], ""])
    print_table(columns, rows, right=columns[2:-1])
    for sentence in [*ranking.notes, ranking.why]:
        note(sentence, quiet)
    if ranking.candidates and not ranking.selected:
        note("'pimerge tune' will train a fresh expert (--no-gate selects anyway)", quiet)
    elif k is not None and len(ranking.candidates) < k:
        note(f"comparable: {len(ranking.candidates)}, of {k} requested", quiet)
    elif k is not None and len(ranking.selected) < k:
        helpful = sum(each.helps for each in ranking.candidates)
        if helpful < k:
            note(f"expected to help: {helpful}, of {k} requested", quiet)


def _points(candidate: Candidate) -> str:
    """The expected gain and its interval, in points of accuracy."""
    values = (candidate.gain or 0.0, candidate.gain_low or 0.0, candidate.gain_high or 0.0)
    gain, low, high = (f"{100 * value:+.1f}" for value in values)
    return f"{gain} [{low}, {high}]"


def print_measures(json: bool) -> None:
    """Every measure, what it needs and what it is."""
    rows = [[measure.name, measure.requirements, measure.summary] for measure in MEASURES]
    if json:
        print_json([dict(zip(("measure", "needs", "summary"), row, strict=True)) for row in rows])
    else:
        print_table(["measure", "needs", ""], rows)


def print_gains(gains: Mapping[str, Mapping[str, Mapping[float, float]]], store: str, json: bool) -> None:
    """What ``rank --calibrate`` measured: the gain of each source for each target, at its best scale.

    Args:
        gains: target → source → scale → gain.
    """
    if json:
        print_json({"store": store, "gains": gains})
        return
    sources = sorted({source for row in gains.values() for source in row})
    rows = [
        [name, *(f"{100 * max(row[source].values()):+.1f}" if source in row else "" for source in sources)]
        for name, row in gains.items()
    ]
    print_table(["target \\ source, points at its best scale", *sources], rows, right=sources)


def print_explanation(found: Explanation, json: bool) -> None:
    """Why a candidate has its score: by tensor for a measure of the store, by measure and strength for examples."""
    if json:
        print_json(found.to_dict())
        return
    if found.strengths:
        parts = list(next(iter(found.strengths.values())))
        rows = [
            [f"{scale:g}", *(f"{values[part]:+.4f}" for part in parts)] for scale, values in found.strengths.items()
        ]
        print_table(["scale", *parts], rows, right=["scale", *parts])
    if found.tensors:
        total = sum(found.tensors.values())
        ordered = sorted(found.tensors.items(), key=lambda item: -abs(item[1]))
        rows = [[tensor, f"{value:+.4f}"] for tensor, value in ordered[:SHOWN]]
        if len(ordered) > SHOWN:
            rows.append([f"{len(ordered) - SHOWN} others", f"{sum(v for _, v in ordered[SHOWN:]):+.4f}"])
        rows.append(["sum", f"{total:+.4f}"])
        print_table(["tensor", f"adds to '{found.measure}'"], rows, right=[f"adds to '{found.measure}'"])
