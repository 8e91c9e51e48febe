"""The folders of ``pimerge/`` import one way, and no modules import each other in a circle.

Computed from the syntax tree, so imports inside functions and those for annotations alone count like all others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pimerge

PACKAGE = Path(pimerge.__file__).parent
ORDER = [
    "core",
    "checkpoints",
    "tasks",
    "peft_methods",
    "adapters",
    "models",
    "embedding",
    "merging",
    "tuning",
    "ranking",
    "evaluation",
    "reporting",
    "cli",
]
OUTSIDE_THE_ORDER = {"__init__", "__main__"}


def name_of(file: Path) -> str:
    """The import name of a file.

    >>> name_of(PACKAGE / "core" / "errors.py")
    'pimerge.core.errors'
    """
    return ".".join(["pimerge", *file.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """Every module of the package that a module imports, anywhere in its source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "pimerge":
                yield name if name in MODULES else name.rpartition(".")[0]


def graph() -> dict[str, set[str]]:
    """Module → the modules that it imports; a package counts as its ``__init__.py``."""
    found = {}
    for module, file in MODULES.items():
        targets = set(imported(module, ast.parse(file.read_text(encoding="utf-8"))))
        assert targets <= MODULES.keys(), f"{module} imports {targets - MODULES.keys()}"
        found[module] = targets - {module}
    return found


def folder_of(module: str) -> str:
    """The folder below ``pimerge/`` that a module lies in.

    >>> folder_of("pimerge.core.errors"), folder_of("pimerge")
    ('core', '__init__')
    """
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Each import of a folder that comes later in the order."""
    return [
        f"{module} → {target}"
        for module, targets in edges.items()
        for target in sorted(targets)
        if not {folder_of(module), folder_of(target)} & OUTSIDE_THE_ORDER
        and ORDER.index(folder_of(target)) > ORDER.index(folder_of(module))
    ]


def test_the_package_holds_the_folders_of_the_order_and_nothing_else() -> None:
    entries = {entry.name for entry in PACKAGE.iterdir()} - {"__pycache__"}
    assert entries == {*ORDER, "__init__.py", "__main__.py", "py.typed"}


def test_folders_import_only_those_before_them() -> None:
    assert upward(graph()) == []


def test_an_upward_import_is_found() -> None:
    tree = ast.parse("def f():\n    from pimerge.cli.console import note\n")
    assert upward({"pimerge.core.files": set(imported("pimerge.core.files", tree))}) == [
        "pimerge.core.files → pimerge.cli.console"
    ]


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        raise AssertionError(" → ".join(error.args[1])) from None


def test_only_the_command_line_knows_the_terminal() -> None:
    terminal = {"typer", "rich", "click"}
    for module, file in MODULES.items():
        if folder_of(module) in ("cli", "__main__"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not terminal & {name.partition(".")[0] for name in names}, module


def test_the_tests_mirror_the_package() -> None:
    tests = Path(__file__).parent
    beside = {"contracts", "faults", "examples", "integration", "support", "__pycache__"}
    for folder in tests.rglob("*"):
        if folder.is_dir() and not set(folder.relative_to(tests).parts) & beside:
            assert (PACKAGE / folder.relative_to(tests)).is_dir(), folder


def test_tests_share_only_what_lies_in_support() -> None:
    tests = Path(__file__).parent
    for file in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                assert not name.startswith("tests.") or name.startswith("tests.support."), f"{file} imports {name}"
                assert name.partition(".")[0] != "conftest", file
