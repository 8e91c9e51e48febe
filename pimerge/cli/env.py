"""``pimerge env``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pimerge.cli import options
from pimerge.cli.console import note, print_json, print_table, size_text


def env(
    folder: Annotated[Path, typer.Argument(help="Folder to look in, with all folders below it.")] = Path(),
    clean: Annotated[bool, typer.Option("--clean", help="Remove the files that are listed.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show versions, and the files that pimerge keeps between commands.

    Kept are hashes of large files, checkpoints of trainings that were stopped, and runs of comparisons. None of them is
    needed: without them, a command takes longer.
    """
    from pimerge.core.errors import PimergeError
    from pimerge.core.kept_files import find_kept
    from pimerge.core.manifest import library_versions

    if not folder.is_dir():
        raise PimergeError(f"'{folder}' is not a folder", "name the folder to look in")
    versions, kept = library_versions(), find_kept(folder)
    in_use = [each for each in kept if not each.clean()] if clean else []
    for each in in_use:
        note(f"'{each.path}' stays: a process is writing '{each.output}'", quiet)
    shown = [each for each in kept if each not in in_use]
    if json:
        files = [{"path": str(each.path), "what": each.what, "size": each.size} for each in shown]
        print_json({"versions": versions, "removed" if clean else "kept": files})
        return
    print_table(["library", "version"], [[name, version] for name, version in versions.items()])
    print_table(
        ["removed" if clean else "kept", "size", "what"],
        [[str(each.path), size_text(each.size), each.what] for each in shown],
        right=["size"],
    )
    if shown and not clean:
        note("none of these files is needed; 'pimerge env --clean' removes them", quiet)
