"""Every command of the README and of ``docs/`` runs, in its order, in a folder as the README describes it."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from typer.testing import Result

import pimerge
from pimerge.checkpoints.base import find_base
from pimerge.models.loading import load_base, resolve_device, resolve_dtype
from pimerge.tasks.task import open_task
from tests.support.bases import model_for

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
FAMILIES = (
    "adapters/formats",
    "merging/methods",
    "ranking/measures",
    "reporting/figures",
    "tasks/metrics",
    "tasks/types",
    "tuning/methods",
)
SETUP = "python3 -m venv"


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENTS, re.DOTALL)


def commands() -> list[str]:
    """The lines of the bash blocks, except the two that set up, then the commands in the tables."""
    lines = [part for block in blocks("bash") for line in block.splitlines() for part in line.split(" && ")]
    lines = [line for line in lines if line and not any(word in line for word in (SETUP, ".venv/bin/"))]
    return lines + [line for line in re.findall(r"^\| `(pimerge [^`]+)`", README, re.MULTILINE) if line not in lines]


def test_every_command_runs(cli: Callable[..., Result], tmp_path: Path) -> None:
    for part in ("base", "experts"):
        (tmp_path / part).symlink_to(DIGITS / part)
    shutil.copytree(DIGITS / "tasks", tmp_path / "tasks")
    assert len(commands()) >= 12
    for command in commands():
        program, *arguments = shlex.split(command)
        result = cli(*arguments)
        assert program == "pimerge"
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception}"
    written = {path.name for path in tmp_path.iterdir() if path.is_dir() and not path.is_symlink()}
    assert written >= {"embeddings", "full", "half", "halved", "merged", "new", "pi-tuned", "small", "ties", "tuned"}
    device = resolve_device("cpu")
    loaded = load_base(
        find_base("base", None, tmp_path), open_task(tmp_path / "tuned"), device, resolve_dtype("auto", device)
    )
    PeftModel.from_pretrained(loaded.model, tmp_path / "tuned")


def test_the_python_about_kinds_runs(bert_base: Path) -> None:
    found: dict[str, Any] = {"base": model_for(bert_base)}
    exec(blocks("python")[0], found)
    assert isinstance(found["model"], PeftModel)


def test_the_python_calls_the_six_functions_as_they_are() -> None:
    """Only the signatures are checked: the notebook makes the same calls and runs."""
    called = set()
    for node in ast.walk(ast.parse(blocks("python")[1])):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("pimerge."):
            name = ast.unparse(node.func).removeprefix("pimerge.")
            signature = inspect.signature(getattr(pimerge, name))
            arguments = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            assert arguments.keys() <= signature.parameters.keys()
            signature.bind(*node.args, **arguments)
            called.add(name)
    assert called == {"embed", "rank", "merge", "tune", "evaluate", "compare"}


def test_the_first_two_commands_set_up_a_virtual_environment_with_the_constraints() -> None:
    run, tests = (block.strip() for block in blocks("bash")[:2])
    for command in (run, tests):
        assert command.startswith(SETUP)
        assert "-c constraints.txt" in command
    assert run.endswith("examples/digits/run.sh")
    assert "-m pytest" in tests


def test_the_tasks_that_it_shows_are_valid(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    found = []
    for shown in blocks("json"):
        path.write_text(shown)
        found.append(open_task(path).labels)
    topics = ["sport", "science", "politics"]
    assert found == [topics, topics, ["negative", "positive"]]


def test_it_lists_every_strategy() -> None:
    for family in FAMILIES:
        names = [file.stem.replace("_", "-") for file in (ROOT / "pimerge" / family).glob("[!_]*.py")]
        assert len(names) >= 5
        assert [name for name in names if f"`{name}`" not in DOCUMENTS] == []


def test_its_links_lead_to_existing_files() -> None:
    for page in [*PAGES, *(ROOT / "examples").rglob("*.md")]:
        for place in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / place).exists(), f"{page}: {place}"
