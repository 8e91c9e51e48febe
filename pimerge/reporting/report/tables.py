"""Tables of a report, one function for each kind of document."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pimerge.core.documents import parse_document
from pimerge.core.errors import PimergeError
from pimerge.reporting.report.document import Cell, Table
from pimerge.tasks.metric import METRICS

if TYPE_CHECKING:
    from pimerge.adapters.ranking_document import Ranking
    from pimerge.core.manifest import Manifest
    from pimerge.embedding.store import Store
    from pimerge.evaluation.schema import ComparisonDocument
    from pimerge.reporting.inspection import Finding

MOST_ROWS = 1000
LARGEST_NUMBER = 1e300  # larger numbers, infinity and NaN are shown but not sorted by
NONE = Cell(text="–")


def experts_table(findings: Sequence[Finding], store: Store | None) -> Table:
    columns = ["expert", "kind", "base", "rank", "parameters", "dtype", "task", "ranks with", "merges with"]
    fisher = ["Fisher: examples", "trace", "effective parameters"] if store else []
    rows = []
    for finding in findings:
        expert, known = finding.expert, finding.fisher
        if expert is None:
            rows.append([Cell(text=finding.path.name), Cell(text="cannot be read"), *[NONE] * (7 + len(fisher))])
            continue
        row = [
            Cell(text=expert.name),
            Cell(text=expert.kind),
            Cell(text=str(expert.config.get("base_model_name_or_path"))),
            _number(max(expert.ranks), "/".join(map(str, expert.ranks))) if expert.ranks else NONE,
            _number(expert.parameters, f"{expert.parameters:,}"),
            Cell(text="/".join(expert.dtypes)),
            Cell(text=finding.task.file.type if finding.task else "–"),
            _number(len(finding.ranks_with)),
            _number(len(finding.merges_with)),
        ]
        if store and known:
            row += [
                _number(known.examples),
                _number(known.trace, f"{known.trace:.3g}"),
                _number(known.effective, f"{known.effective:.1f}"),
            ]
        elif store:
            row += [NONE] * len(fisher)
        rows.append(row)
    return table("Experts", [*columns, *fisher], rows)


def store_table(store: Store) -> Table:
    rows = [
        [
            Cell(text=name),
            Cell(text=entry.kind),
            Cell(text=str(entry.task.get("type", "–"))),
            _number(entry.examples),
            _number(entry.tokens),
            _number(entry.trace, f"{entry.trace:.3g}"),
        ]
        for name, entry in store.experts.items()
    ]
    return table("Experts of the store", ["expert", "kind", "task", "examples", "tokens", "Fisher trace"], rows)


def ranking_table(path: Path, ranking: Ranking) -> Table:
    rows = [
        [
            _number(place),
            Cell(text=each.name),
            _number(each.score, f"{each.score:.4f}"),
            _number(each.low, f"{each.low:.4f} – {each.high:.4f}"),
            _number(each.scale, f"{each.scale:g}"),
            NONE if each.gain is None else _number(each.gain, f"{100 * each.gain:+.1f}"),
            Cell(text="selected" if each.name in ranking.selected else "" if each.helps else "not expected to help"),
        ]
        for place, each in enumerate(ranking.candidates, 1)
    ]
    rows += [
        [NONE, Cell(text=each.name), *[NONE] * 4, Cell(text=f"not comparable: {each.reason}")]
        for each in ranking.not_comparable
    ]
    columns = ["", "expert", ranking.measure, "95 %", "scale", "expected gain, points", "verdict"]
    return table(f"{path.name}: for {ranking.target.name} by {ranking.measure}", columns, rows)


def output_row(folder: Path, manifest: Manifest) -> list[Cell]:
    options, results = manifest.options, manifest.results
    weights = _mean_weights(folder)
    names = [
        f"{each.name} {weights[place]:.2f}" if place < len(weights) else each.name
        for place, each in enumerate(manifest.inputs)
    ]
    return [
        Cell(text=folder.name),
        Cell(text=f"{manifest.command} {options.get('method', '')}".strip()),
        Cell(text=str(options.get("target") or "–")),
        Cell(text=", ".join(names) or "–"),
        _maybe(options.get("seed"), "{:g}"),
        _maybe(results.get("train_examples"), "{:,}"),
        _maybe(results.get("train_loss"), "{:.4f}"),
        _maybe(results.get("held_out_loss"), "{:.4f}"),
        _maybe(results.get("truncation"), "{:.2%}"),
        _maybe(results.get("trained_parameters"), "{:,}"),
    ]


def _mean_weights(folder: Path) -> list[float]:
    """Return the mean weight of each expert over all modules; empty if the output has no coefficients."""
    from pimerge.adapters.writer import COEFFICIENTS_FILE, Coefficients

    if not (folder / COEFFICIENTS_FILE).is_file():
        return []
    weights = parse_document(Coefficients, folder / COEFFICIENTS_FILE).weights.values()
    if len({len(row) for row in weights}) > 1:
        raise PimergeError(f"'{folder / COEFFICIENTS_FILE}' has rows of weights of different lengths")
    return [statistics.fmean(each) for each in zip(*weights, strict=True)]


def scores_table(path: Path, content: Mapping[str, Any]) -> Table:
    metrics = list(content["scores"][0]["metrics"]) if content["scores"] else []
    styles = [METRICS.load(name).format for name in metrics]
    rows = []
    for score in content["scores"]:
        row = [Cell(text=str(score["name"]))]
        for name, style in zip(metrics, styles, strict=True):
            known = score["metrics"][name]
            row.append(_number(known["value"], format(known["value"], style)))
            row.append(_number(known["low"], f"{known['low']:{style}} – {known['high']:{style}}"))
        row.append(_number(score["loss"], f"{score['loss']:.3f}"))
        low, high = score["loss_low"], score["loss_high"]
        row.append(NONE if low is None else _number(low, f"{low:.3f} – {high:.3f}"))
        rows.append([*row, _number(score["examples"]), Cell(text=str(score["note"]))])
    columns = ["expert", *(title for name in metrics for title in (name, "95 %")), "loss", "95 %", "n", "head"]
    return table(f"{path.name}: on the {content['split']} split of {content['target']}", columns, rows)


def comparison_table(path: Path, comparison: ComparisonDocument) -> Table:
    style = METRICS.load(comparison.metric).format
    rows = [
        [
            Cell(text=line.method + (" (control)" if line.control else "")),
            Cell(text="all") if line.shots is None else _number(line.shots),
            _number(line.k),
            Cell(text=line.test),
            _number(line.seeds),
            _number(line.mean, f"{line.mean:{style}}"),
            _number(line.sd, f"{line.sd:{style}}"),
            NONE if line.difference is None else _number(line.difference, f"{line.difference:+{style}}"),
            NONE
            if line.low is None or line.high is None
            else _number(line.low, f"{line.low:+{style}} – {line.high:+{style}}"),
            _number(line.trained_parameters, f"{line.trained_parameters:,}"),
            _number(line.deployed_parameters, f"{line.deployed_parameters:,}"),
            _number(line.seconds, f"{line.seconds:.1f}"),
        ]
        for line in comparison.lines
    ]
    columns = ["method", "shots", "k", "test set", "seeds", comparison.metric, "sd", "to best control", "95 %"]
    columns += ["trained", "deployed", "seconds"]
    return table(f"{path.name}: {comparison.target} on {comparison.base}", columns, rows)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    """Build a table; a column is numeric if all of its non-empty cells have a value."""
    numbers = [
        any(row[place].value is not None for row in rows)
        and all(row[place].value is not None or row[place].text in ("–", "all") for row in rows)
        for place in range(len(columns))
    ]
    return Table(
        title=title,
        columns=list(columns),
        numbers=numbers,
        rows=[list(row) for row in rows[:MOST_ROWS]],
        left_out=max(0, len(rows) - MOST_ROWS),
    )


def _number(value: float, text: str | None = None) -> Cell:
    return Cell(text=str(value) if text is None else text, value=value if abs(value) < LARGEST_NUMBER else None)


def _maybe(value: Any, style: str) -> Cell:
    """Format a number of an option or a result; a dash if the output does not have it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value > LARGEST_NUMBER:
        return NONE
    return _number(value, style.format(value))
