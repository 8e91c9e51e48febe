"""Whether the fields of ``task.json`` fit its type."""

from __future__ import annotations

from pimerge.core import plugins
from pimerge.core.errors import PimergeError, Problems, nearest
from pimerge.tasks.schema import COMMON, ROLES, TaskFile


def require_type(kind: str, where: str) -> None:
    """Refuse a type of task that does not exist."""
    known = list(plugins.summaries("pimerge.tasks.types"))
    if kind not in known:
        raise PimergeError(f"{where}: type is '{kind}'", nearest(kind, known))


def check_fields(file: TaskFile, where: str) -> None:
    """Check that the fields of a task fit its type; all problems are raised at once."""
    kind, labels = plugins.load("pimerge.tasks.types", file.type), file.labels or []
    problems = Problems()
    for field in sorted(file.given() - COMMON - kind.FIELDS):
        problems.add(
            f"{where}: the type '{file.type}' has no field '{field}'",
            f"it has {', '.join(sorted(kind.FIELDS))}" if kind.FIELDS else "leave it out",
        )
    for role in sorted(set(file.columns) - set(kind.COLUMNS)):
        problems.add(f"{where}: columns names the role '{role}'", nearest(role, list(kind.COLUMNS)))
    for role in sorted(set(file.splits) - set(ROLES)):
        problems.add(f"{where}: splits names the role '{role}'", nearest(role, ROLES))
    if len(set(labels)) < len(labels):
        problems.add(f"{where}: labels has a name twice", "give each class a name of its own")
    with problems.collected(f"{where}: "):
        kind.check(file)
    problems.raise_any(f"{where} does not fit")
