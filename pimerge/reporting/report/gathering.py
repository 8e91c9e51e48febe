"""Collect the documents of a folder into the sections of a report, which also state what could not be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pimerge.adapters.model_card import CARD_FILE
from pimerge.core.documents import parse_document
from pimerge.core.errors import PimergeError
from pimerge.core.files import read_json
from pimerge.core.manifest import MANIFEST_FILE, Manifest
from pimerge.core.version import __version__
from pimerge.reporting.figure import FIGURES
from pimerge.reporting.report import tables
from pimerge.reporting.report.document import LongText, Picture, Report, Section

if TYPE_CHECKING:
    from pydantic import BaseModel

    from pimerge.embedding.store import Store

MOST_PAIRS = 200  # experts of a larger pool are not compared with each other
LARGEST_DOCUMENT = 20_000_000
LONGEST_CARD = 20_000
POOL, STORE = "experts", "embeddings.json"


@dataclass
class FolderDocuments:
    """JSON documents of a folder by kind, each with its path, and the problems of unreadable ones."""

    rankings: list[tuple[Path, Any]] = field(default_factory=list)
    scores: list[tuple[Path, Any]] = field(default_factory=list)
    comparisons: list[tuple[Path, Any]] = field(default_factory=list)
    plots: list[tuple[Path, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def gather(folder: Path) -> Report:
    """Build the report on a folder."""
    if not folder.is_dir():
        raise PimergeError(f"there is no folder '{folder}'")
    found = sort_documents(folder)
    sections = [
        _pool(folder),
        _rankings(found),
        _outputs(folder),
        _scores(found),
        _comparisons(found),
        _plots(folder, found),
    ]
    if all(section.is_empty for section in sections):
        raise PimergeError(
            f"there is nothing in '{folder}' to report on: no experts, no store, no ranking, no output",
            "run 'pimerge embed ./experts' first, or name the folder",
        )
    return Report(folder=folder.resolve().name, version=__version__, sections=sections)


def sort_documents(folder: Path) -> FolderDocuments:
    """Sort the JSON files of a folder by their content; files of other programs are skipped."""
    found = FolderDocuments()
    kinds: Sequence[tuple[list[tuple[Path, Any]], set[str]]] = [
        (found.plots, {"figure"}),
        (found.rankings, {"candidates", "selected", "measure"}),
        (found.scores, {"target", "split", "scores"}),
        (found.comparisons, {"runs", "lines", "conclusion"}),
    ]
    for path in sorted(folder.glob("*.json")):
        if path.name == STORE or not path.is_file() or path.stat().st_size > LARGEST_DOCUMENT:
            continue
        try:
            content = read_json(path)
        except PimergeError as error:
            found.problems += _messages(error)
            continue
        for documents, keys in kinds:
            if isinstance(content, dict) and keys <= content.keys():
                documents.append((path, content))
                break
    return found


def _pool(folder: Path) -> Section:
    """Describe the experts of ./experts, with the Fisher information that the store holds."""
    section = Section(name="pool", title="The pool")
    store = _store(folder, section)
    if (folder / POOL).is_dir():
        from pimerge.adapters.pool import find_experts
        from pimerge.reporting.inspection import inspect

        try:
            paths = find_experts(folder / POOL)
            if len(paths) > MOST_PAIRS:
                section.sentences.append(
                    f"{len(paths)} experts: the report compares those of pools of up to {MOST_PAIRS}"
                )
                findings = [one for path in paths[: tables.MOST_ROWS] for one in inspect([path], None, store)]
            else:
                findings = inspect(paths, None, store)
        except PimergeError as error:
            section.problems += _messages(error)
        else:
            section.tables.append(tables.experts_table(findings, store))
            section.problems += [
                f"{finding.path.name}: {problem.message}" for finding in findings for problem in finding.problems
            ]
    elif store is not None:
        section.tables.append(tables.store_table(store))
    else:
        section.missing.append(
            ("a pool of experts", "pimerge tune --method scratch --target TASK --output experts/NAME")
        )
    if store is None:
        section.missing.append(("the experts' Fisher information", "pimerge embed ./experts"))
    return section


def _store(folder: Path, section: Section) -> Store | None:
    from pimerge.embedding.store import Store

    try:
        return Store(folder / STORE) if (folder / STORE).is_file() else None
    except PimergeError as error:
        section.problems += _messages(error)
        return None


def _rankings(found: FolderDocuments) -> Section:
    from pimerge.adapters.ranking_document import Ranking

    section = Section(name="ranking", title="Who is expected to help")
    for path, ranking in _parsed(Ranking, found.rankings, section):
        section.tables.append(tables.ranking_table(path, ranking))
        section.sentences.append(f"{path.name}: {ranking.why}")
        section.sentences += ranking.notes
        if ranking.candidates and not ranking.selected:
            section.sentences.append(f"{path.name}: no expert is expected to help {ranking.target.name}.")
    if not found.rankings:
        section.missing.append(("a ranking", "pimerge rank --target NAME -k 2"))
    return section


def _outputs(folder: Path) -> Section:
    """Describe the folders that pimerge wrote."""
    section = Section(name="outputs", title="Merged and tuned")
    rows = []
    for path in sorted(folder.glob(f"*/{MANIFEST_FILE}")):
        try:
            manifest = parse_document(Manifest, path)
            rows.append(tables.output_row(path.parent, manifest))
            if (path.parent / CARD_FILE).is_file():
                content = (path.parent / CARD_FILE).read_text(encoding="utf-8", errors="replace")[:LONGEST_CARD]
                section.texts.append(LongText(title=f"The model card of {path.parent.name}", content=content))
        except PimergeError as error:
            section.problems += _messages(error)
    if rows:
        columns = ["folder", "by", "for", "experts, mean weight", "seed", "examples", "train loss", "held-out loss"]
        columns += ["lost by truncation", "trained parameters"]
        section.tables.append(tables.table("Outputs", columns, rows))
    commands = {str(row[1].text).partition(" ")[0] for row in rows}
    if "merge" not in commands:
        section.missing.append(("a merged expert", "pimerge merge --method uniform"))
    if "tune" not in commands:
        section.missing.append(("a tuned expert", "pimerge tune"))
    return section


def _scores(found: FolderDocuments) -> Section:
    section = Section(name="scores", title="Scores on test splits")
    for path, content in found.scores:
        try:
            section.tables.append(tables.scores_table(path, content))
        except (PimergeError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError):  # no schema
            section.problems.append(f"'{path}' is not what 'pimerge eval --output' writes")
    if not found.scores:
        section.missing.append(("scores", "pimerge eval tuned merged --output scores.json"))
    return section


def _comparisons(found: FolderDocuments) -> Section:
    from pimerge.evaluation.schema import ComparisonDocument

    section = Section(name="comparison", title="Methods against controls")
    for path, comparison in _parsed(ComparisonDocument, found.comparisons, section):
        try:
            section.tables.append(tables.comparison_table(path, comparison))
            section.sentences.append(f"{path.name}: {comparison.conclusion}")
        except PimergeError as error:  # this version does not know the metric
            section.problems += _messages(error)
    if not found.comparisons:
        section.missing.append(("a comparison with controls", "pimerge compare --target NAME --shots 1,5,20 --seeds 3"))
    return section


def _plots(folder: Path, found: FolderDocuments) -> Section:
    section = Section(name="plots", title="Plots")
    summaries = {figure.name: figure.summary for figure in FIGURES}
    drawn = set()
    for path, content in found.plots:
        figure = str(content["figure"])
        pictures = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
        picture = next((each for each in pictures if each.is_file()), None)
        if picture is None or figure not in summaries:
            what = "has no picture beside it" if figure in summaries else f"is of the unknown plot '{figure}'"
            section.problems.append(f"'{path}' {what}; run 'pimerge plot {figure} --data {path} --force'")
            continue
        drawn.add(figure)
        alt = f"{summaries[figure]} The data is in {path.name}."
        title = path.stem if path.stem == figure else f"{path.stem} ({figure})"
        section.pictures.append(Picture(file=picture.name, title=title, alt=alt))
    section.missing += [(summaries[name], f"pimerge plot {name}") for name in summaries if name not in drawn]
    section.problems += found.problems
    return section


def _parsed(
    model: type[BaseModel], documents: Sequence[tuple[Path, Any]], section: Section
) -> Iterator[tuple[Path, Any]]:
    """Yield each valid document; the problems of the others are added to the section."""
    for path, _ in documents:
        try:
            yield path, parse_document(model, path)
        except PimergeError as error:
            section.problems += _messages(error)


def _messages(error: PimergeError) -> list[str]:
    return [problem.message for problem in error.problems]
