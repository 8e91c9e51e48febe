"""Commands that are stopped on the way, the folders that they run in, and what may be there afterwards."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pimerge.embedding.store import Store
from tests.support.forks import Ended, forked

Tree = dict[str, bytes]
ALL = os.environ.get("PIMERGE_FAULTS") == "all"
"""Whether every point is tried instead of a sample."""
LAST = 4
EMBED, RANK = "embed experts -q --examples 4", "rank --target X -k 2 --no-gate -q"
TUNE = "--epochs 1 --shots 2 -q"
_SECONDS = re.compile(rb'(?<="seconds": )[^,\n]*|,[0-9.]+(?=\n)')


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        outputs: what it writes, in its folder; several files are one output.
        before: the commands that run before it, undisturbed.
        tried: how many points are tried in the suite, besides the last ones.
        leaves_out: whether the output says what it leaves out, and is complete again with ``--force``.
        timed: whether its outputs hold the seconds that it took.
    """

    command: str
    outputs: tuple[str, ...]
    before: tuple[str, ...] = ()
    tried: int = 1
    leaves_out: bool = False
    timed: bool = False


_PLOT = ("graph.png", "graph.svg", "graph.json")
STORE = ("embeddings.json",)
_COMPARISON = ("comparison.json", "comparison.md", "comparison.csv")
_STATES = "a.safetensors b.safetensors"
_RANKED = (EMBED, RANK)
JOBS = {
    "merge": Job("merge -q", ("merged",), _RANKED),
    "merge-force": Job("merge --force -q --method ties", ("merged",), (*_RANKED, "merge -q")),
    "merge-into": Job("merge --into base -o full -q", ("full",), _RANKED),
    "merge-file": Job(f"merge {_STATES} -o both.safetensors -q", ("both.safetensors",)),
    "merge-file-force": Job(
        f"merge {_STATES} -o both.safetensors --force --weights 0.25,0.75 -q",
        ("both.safetensors",),
        (f"merge {_STATES} -o both.safetensors -q",),
    ),
    "embed": Job(EMBED, STORE),
    "embed-reseeded": Job(f"{EMBED} --seed 1", STORE, (EMBED,)),
    "embed-grams": Job(f"{EMBED} --grams", STORE, (EMBED,)),
    "rank": Job(RANK, ("ranking.json",), (EMBED,), leaves_out=True),
    "rank-force": Job(f"{RANK} --force -k 1", ("ranking.json",), _RANKED, leaves_out=True),
    "tune": Job(f"tune --method learned {TUNE}", ("tuned",), _RANKED),
    "tune-force": Job(f"tune --method learned {TUNE} --force", ("tuned",), (*_RANKED, f"tune --method uniform {TUNE}")),
    "tune-ensemble": Job(f"tune --method ensemble {TUNE}", ("tuned",), _RANKED),
    "tune-full": Job(f"tune --method full {TUNE}", ("tuned",), _RANKED),
    "compare": Job(
        "compare --target X --seeds 1 --shots 2 --epochs 1 --methods learned --controls head -q",
        _COMPARISON,
        _RANKED,
        timed=True,
    ),
    "plot": Job("plot graph -q", _PLOT, _RANKED, leaves_out=True),
    "plot-force": Job(
        "plot graph -q --force --measure parameters", _PLOT, (*_RANKED, "plot graph -q"), leaves_out=True
    ),
    "report": Job("report -q", ("report.html",), _RANKED, leaves_out=True),
    "convert": Job("convert pickled -o new -q", ("new",)),
    "convert-rank": Job("convert experts/a --rank 1 -o new -q", ("new",)),
    "convert-file": Job("convert pickled/adapter_model.bin -o new.safetensors -q", ("new.safetensors",)),
    "extract": Job("extract other --base base --rank 1 -o lora -q", ("lora",)),
    "eval": Job("eval experts/a -o scores.json -q", ("scores.json",), _RANKED),
}


def tree(folder: Path, timed: bool = False) -> Tree:
    """Path → content of every file below a folder, hidden ones too, and of every empty folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file():
            content = path.read_bytes()
            if timed and name.startswith("comparison"):
                content = b"" if path.suffix == ".md" else _SECONDS.sub(b"", content)
            found[name] = content
        elif not any(path.iterdir()):
            found[f"{name}/"] = b""
    return found


def part(found: Tree, outputs: Sequence[str]) -> Tree:
    """What a tree holds of some outputs."""
    return {name: content for name, content in found.items() if name.split("/")[0] in outputs}


@dataclass
class Workshop:
    """Runs jobs, each in a folder of the same path, since outputs may hold paths.

    Attributes:
        root: an empty folder.
        start: the folder that every job starts with.
    """

    root: Path
    start: Path
    made: dict[tuple[str, ...], Path] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where commands run."""
        return self.root / "work"

    def run(self, command: str, prepare: Callable[[], object] = lambda: None) -> Ended:
        """Run a command in the folder as it is."""
        return forked(command, self.folder, self.root / "printed", prepare)

    def lay_out(self, before: tuple[str, ...]) -> None:
        """Make the folder as it is after some commands."""
        source = self.start
        if before:
            if before not in self.made:
                self.lay_out(before[:-1])
                done = self.run(before[-1])
                assert done.code == 0, (before[-1], done.err)
                self.made[before] = Path(shutil.copytree(self.folder, self.root / f"after-{len(self.made)}"))
            source = self.made[before]
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(source, self.folder)

    def undisturbed(self, job: Job, counted: Callable[[], object]) -> tuple[Tree, Tree, int]:
        """The trees before and after a job, and the number of points that its run counts."""
        self.lay_out(job.before)
        before = tree(self.folder, job.timed)
        done = self.run(job.command, counted)
        assert done.code == 0, done.err
        return before, tree(self.folder, job.timed), done.reported

    def points(self, job: Job, changes: int) -> list[int]:
        """The changes before which a job is stopped: a sample, always with the last ones."""
        early = range(max(changes - LAST, 0))
        return [*drawn(job, early), *range(len(early), changes)]

    def is_whole(self, job: Job, before: Tree, after: Tree) -> bool:
        """Whether an output is the old one or the new one; of a store, whether it has all that it names."""
        if job.outputs == STORE:
            store = Store(self.folder / STORE[0])
            return all(store.is_current(name, {}) for name in store.experts)
        found = part(tree(self.folder, job.timed), job.outputs)
        return len(job.outputs) > 1 or found in (part(before, job.outputs), part(after, job.outputs))

    def rerun(self, job: Job, after: Tree, *more: str) -> str:
        """Run a job to its end after a disturbance, and say how what is there differs from an undisturbed run.

        Args:
            more: further options.
        """
        again = self.run(" ".join([job.command, *more]))
        if again.code != 0:
            return f"the rerun fails with {again.code}: {again.err[-300:]}"
        ended = tree(self.folder, job.timed)
        differing = sorted(each for each in ended.keys() | after.keys() if ended.get(each) != after.get(each))
        return f"the rerun leaves other files: {differing}" if differing else ""


def drawn(job: Job, points: Sequence[int], count: int | None = None) -> list[int]:
    """A sample of a job's points: the same in every run."""
    if ALL:
        return list(points)
    return sorted(random.Random(job.command).sample(points, min(job.tried if count is None else count, len(points))))
