"""Check that the fields of ``task.json`` fit its type."""

from __future__ import annotations

from pimerge.core.errors import PimergeError, Problems, nearest
from pimerge.tasks.metric import check_metrics
from pimerge.tasks.schema import COMMON, ROLES, TaskFile
from pimerge.tasks.task_type import TASK_TYPES


def require_type(kind: str, where: str) -> None:
    """Refuse an unknown type of task."""
    known = TASK_TYPES.names()
    if kind not in known:
        raise PimergeError(f"{where}: type is '{kind}'", nearest(kind, known))


def check_fields(file: TaskFile, where: str) -> None:
    """Check that the fields of a task fit its type; all problems are raised at once."""
    kind, labels = TASK_TYPES.load(file.type), file.labels or []
    problems = Problems()
    for field in sorted(file.given() - COMMON - kind.fields):
        problems.add(
            f"{where}: the type '{file.type}' has no field '{field}'",
            f"it has {', '.join(sorted(kind.fields))}" if kind.fields else "leave it out",
        )
    for role in sorted(set(file.columns) - set(kind.columns)):
        problems.add(f"{where}: columns names the role '{role}'", nearest(role, list(kind.columns)))
    for role in sorted(set(file.splits) - set(ROLES)):
        problems.add(f"{where}: splits names the role '{role}'", nearest(role, ROLES))
    if len(set(labels)) < len(labels):
        problems.add(f"{where}: labels has a name twice", "give each class a name of its own")
    with problems.collected(f"{where}: "):
        kind.check(file)
    with problems.collected(f"{where}: "):
        check_metrics(file.metrics or [], kind.answer_forms(file))
    problems.raise_any(f"{where} does not fit")
