"""Results of a comparison as tables, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pimerge.core.files import json_text, write_files
from pimerge.core.replacing import require_same_or_absent
from pimerge.evaluation.design import shots_text
from pimerge.evaluation.schema import ComparisonDocument, ComparisonLine, ComparisonRun
from pimerge.tasks.metric import METRICS

COLUMNS = ("method", "experts", "score", "to the best control", "95 %", "trained", "deployed", "seconds")


@dataclass(frozen=True)
class Comparison:
    """Scores of tune methods and controls over several samplings of few labels.

    Attributes:
        document: the content of ``comparison.json``.
    """

    document: ComparisonDocument

    @property
    def runs(self) -> list[ComparisonRun]:
        """Every training with its scores."""
        return self.document.runs

    @property
    def lines(self) -> list[ComparisonLine]:
        """Mean, standard deviation and paired difference to the best control, a line for each method and setting."""
        return self.document.lines

    @property
    def conclusion(self) -> str:
        """One sentence: which method won, or that none can be told from the best control."""
        return self.document.conclusion

    def to_dict(self) -> dict[str, Any]:
        """Return the document that ``pimerge compare --json`` prints."""
        return self.document.model_dump()

    def tables(self) -> list[tuple[str, list[list[str]]]]:
        """Return a title and rows of :data:`COLUMNS` for each number of shots and test set, the highest score first."""
        document, style = self.document, METRICS.load(self.document.metric).format
        groups: dict[tuple[int | None, str], list[ComparisonLine]] = {}
        for line in document.lines:
            groups.setdefault((line.shots, line.test), []).append(line)
        tables = []
        for (shots, test), lines in groups.items():
            seeds = max(line.seeds for line in lines)
            over = f"{seeds} seed" if seeds == 1 else f"{seeds} seeds"
            on = "" if test == "test" else f" on {test}"
            title = f"{document.target}{on}, {shots_text(shots)}, {document.metric} over {over}"
            ordered = sorted(lines, key=lambda line: -line.mean)
            tables.append((title, [_row(line, style) for line in ordered]))
        return tables

    def markdown(self) -> str:
        """Return the tables and the conclusion as Markdown."""
        parts = [f"# {self.document.target} on {self.document.base}"]
        for title, rows in self.tables():
            table = [COLUMNS, ["---"] * len(COLUMNS), *rows]
            parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in table))
        return "\n\n".join([*parts, self.conclusion]) + "\n"

    def csv(self) -> str:
        """Return CSV with a row for each run and test set."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head = ["method", "shots", "seed", "experts", "test", self.document.metric, "loss"]
        writer.writerow([*head, "trained", "deployed", "seconds"])
        for run in self.runs:
            for test, score in run.scores.items():
                shots = "all" if run.shots is None else run.shots
                sizes = [run.trained_parameters, run.deployed_parameters, f"{run.seconds:.3f}"]
                found = [score, run.losses[test], *sizes]
                writer.writerow([run.method, shots, run.seed, " ".join(run.experts), test, *found])
        return text.getvalue()

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the document, and beside it the tables as ``.md`` and the runs as ``.csv``.

        Args:
            force: whether to replace other content.
        """
        path = Path(path)
        kept = Comparison(_with_kept_seconds(self.document, path))
        texts: Mapping[Path, bytes | str] = {
            path: json_text(kept.to_dict()),
            path.with_suffix(".md"): kept.markdown(),
            path.with_suffix(".csv"): kept.csv(),
        }
        for file, text in texts.items():
            require_same_or_absent(file, text, force)
        write_files(texts)


def _with_kept_seconds(document: ComparisonDocument, path: Path) -> ComparisonDocument:
    """The document in a file, if it differs from this one in nothing but the seconds; otherwise this one."""
    try:
        found = ComparisonDocument.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return document
    timeless = {"runs": {"__all__": {"seconds"}}, "lines": {"__all__": {"seconds"}}}
    same = found.model_dump(exclude=timeless) == document.model_dump(exclude=timeless)
    return found if same else document


def _row(line: ComparisonLine, style: str) -> list[str]:
    points = 100 if style.endswith("%") else 1
    difference = "" if line.difference is None else f"{points * line.difference:+.1f}"
    interval = "" if line.low is None or line.high is None else f"{points * line.low:+.1f} – {points * line.high:+.1f}"
    return [
        line.method + (" (control)" if line.control else ""),
        str(line.k) if line.k else "–",
        f"{line.mean:{style}} ± {line.sd:{style}}",
        difference,
        interval,
        str(line.trained_parameters),
        str(line.deployed_parameters),
        f"{line.seconds:.1f}",
    ]
