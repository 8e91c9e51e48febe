"""The documents that lie in a folder → the report's sections. What cannot be read is said in its section."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
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
from pimerge.reporting.report.document import Cell, LongText, Picture, Report, Section, Table
from pimerge.tasks.metric import METRICS

if TYPE_CHECKING:
    from pydantic import BaseModel

    from pimerge.adapters.ranking_document import Ranking
    from pimerge.embedding.store import Store
    from pimerge.evaluation.schema import ComparisonDocument
    from pimerge.reporting.inspection import Finding

MOST_ROWS = 1000
MOST_PAIRS = 200  # of a larger pool it is not looked at who goes with whom
LARGEST_DOCUMENT = 20_000_000
LONGEST_CARD = 20_000
LARGEST_NUMBER = 1e300  # beyond are no results, and NaN is not below it
POOL, STORE = "experts", "embeddings.json"
NONE = Cell(text="–")


@dataclass
class Found:
    """The JSON documents of a folder by what they are, each with its path; and what could not be read."""

    rankings: list[tuple[Path, Any]] = field(default_factory=list)
    scores: list[tuple[Path, Any]] = field(default_factory=list)
    comparisons: list[tuple[Path, Any]] = field(default_factory=list)
    plots: list[tuple[Path, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def gather(folder: Path) -> Report:
    """The report on a folder.

    Raises:
        PimergeError: if there is nothing in it to report on.
    """
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


def sort_documents(folder: Path) -> Found:
    """What each JSON file of a folder is, by its content; files of others are passed over."""
    found = Found()
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
    """The experts of ./experts, with what the store knows of them."""
    section = Section(name="pool", title="The pool")
    store = _store(folder, section)
    if (folder / POOL).is_dir():
        from pimerge.adapters.expert import find_experts
        from pimerge.reporting.inspection import inspect

        try:
            paths = find_experts(folder / POOL)
            if len(paths) > MOST_PAIRS:
                section.sentences.append(
                    f"{len(paths)} experts: who goes with whom is shown by 'pimerge inspect' for pools of up to "
                    f"{MOST_PAIRS}"
                )
                findings = [one for path in paths[:MOST_ROWS] for one in inspect([path], None, store)]
            else:
                findings = inspect(paths, None, store)
        except PimergeError as error:
            section.problems += _messages(error)
        else:
            section.tables.append(_experts_table(findings, store))
            section.problems += [
                f"{finding.path.name}: {problem.message}" for finding in findings for problem in finding.problems
            ]
    elif store is not None:
        section.tables.append(_store_table(store))
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


def _experts_table(findings: Sequence[Finding], store: Store | None) -> Table:
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
    return _table("Experts", [*columns, *fisher], rows)


def _store_table(store: Store) -> Table:
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
    return _table("Experts of the store", ["expert", "kind", "task", "examples", "tokens", "Fisher trace"], rows)


def _rankings(found: Found) -> Section:
    from pimerge.adapters.ranking_document import Ranking

    section = Section(name="ranking", title="Who is expected to help")
    for path, ranking in _parsed(Ranking, found.rankings, section):
        section.tables.append(_ranking_table(path, ranking))
        section.sentences.append(f"{path.name}: {ranking.why}")
        section.sentences += ranking.notes
        if ranking.candidates and not ranking.selected:
            section.sentences.append(f"{path.name}: no expert is expected to help {ranking.target.name}.")
    if not found.rankings:
        section.missing.append(("a ranking", "pimerge rank --target NAME -k 2"))
    return section


def _ranking_table(path: Path, ranking: Ranking) -> Table:
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
    return _table(f"{path.name}: for {ranking.target.name} by {ranking.measure}", columns, rows)


def _outputs(folder: Path) -> Section:
    """Folders that pimerge has written."""
    section = Section(name="outputs", title="Merged and tuned")
    rows = []
    for path in sorted(folder.glob(f"*/{MANIFEST_FILE}")):
        try:
            manifest = parse_document(Manifest, path)
            rows.append(_output_row(path.parent, manifest))
            if (path.parent / CARD_FILE).is_file():
                content = (path.parent / CARD_FILE).read_text(encoding="utf-8", errors="replace")[:LONGEST_CARD]
                section.texts.append(LongText(title=f"The model card of {path.parent.name}", content=content))
        except PimergeError as error:
            section.problems += _messages(error)
    if rows:
        columns = ["folder", "by", "for", "experts, mean weight", "seed", "examples", "train loss", "held-out loss"]
        columns += ["lost by truncation", "trained parameters"]
        section.tables.append(_table("Outputs", columns, rows))
    commands = {str(row[1].text).partition(" ")[0] for row in rows}
    if "merge" not in commands:
        section.missing.append(("a merged expert", "pimerge merge --method uniform"))
    if "tune" not in commands:
        section.missing.append(("a tuned expert", "pimerge tune"))
    return section


def _output_row(folder: Path, manifest: Manifest) -> list[Cell]:
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
    """Of each expert over all modules, where the output has coefficients."""
    from pimerge.adapters.writer import COEFFICIENTS_FILE, Coefficients

    if not (folder / COEFFICIENTS_FILE).is_file():
        return []
    weights = parse_document(Coefficients, folder / COEFFICIENTS_FILE).weights.values()
    if len({len(row) for row in weights}) > 1:
        raise PimergeError(f"'{folder / COEFFICIENTS_FILE}' has rows of weights of different lengths")
    return [statistics.fmean(each) for each in zip(*weights, strict=True)]


def _scores(found: Found) -> Section:
    section = Section(name="scores", title="Scores on test splits")
    for path, content in found.scores:
        try:
            section.tables.append(_scores_table(path, content))
        except (PimergeError, KeyError, TypeError, ValueError, AttributeError):  # no model says what it has to be
            section.problems.append(f"'{path}' is not what 'pimerge eval --output' writes")
    if not found.scores:
        section.missing.append(("scores", "pimerge eval tuned merged --output scores.json"))
    return section


def _scores_table(path: Path, content: Mapping[str, Any]) -> Table:
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
        row.append(_number(score["loss_low"], f"{score['loss_low']:.3f} – {score['loss_high']:.3f}"))
        rows.append([*row, _number(score["examples"]), Cell(text=str(score["note"]))])
    columns = ["expert", *(title for name in metrics for title in (name, "95 %")), "loss", "95 %", "n", "head"]
    return _table(f"{path.name}: on the {content['split']} split of {content['target']}", columns, rows)


def _comparisons(found: Found) -> Section:
    from pimerge.evaluation.schema import ComparisonDocument

    section = Section(name="comparison", title="Methods against controls")
    for path, comparison in _parsed(ComparisonDocument, found.comparisons, section):
        try:
            section.tables.append(_comparison_table(path, comparison))
            section.sentences.append(f"{path.name}: {comparison.conclusion}")
        except PimergeError as error:  # a metric that this version does not know
            section.problems += _messages(error)
    if not found.comparisons:
        section.missing.append(("a comparison with controls", "pimerge compare --target NAME --shots 1,5,20 --seeds 3"))
    return section


def _comparison_table(path: Path, comparison: ComparisonDocument) -> Table:
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
    return _table(f"{path.name}: {comparison.target} on {comparison.base}", columns, rows)


def _plots(folder: Path, found: Found) -> Section:
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
    """Each document that fits; the problems of the others go into the section."""
    for path, _ in documents:
        try:
            yield path, parse_document(model, path)
        except PimergeError as error:
            section.problems += _messages(error)


def _messages(error: PimergeError) -> list[str]:
    return [problem.message for problem in error.problems]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    """A table; a column holds numbers if every cell of it that says something has one."""
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
    """A number of an option or a result that not every output has."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NONE
    return _number(value, style.format(value))
