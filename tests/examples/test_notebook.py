"""The notebook runs from its first cell to its last, in a copy of its folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "notebooks" / "digits.ipynb"


def test_the_notebook_runs(tmp_path: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for part in ("base", "experts", "tasks"):
        shutil.copytree(EXAMPLES / "digits" / part, tmp_path / "digits" / part)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    lines = [line for line in "\n\n".join(code).splitlines() if not line.startswith("%")]
    (folder / "cells.py").write_text("\n".join(lines), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "cells.py"],
        cwd=folder,
        env={**os.environ, "MPLBACKEND": "Agg", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "selected: inverted-3-9, inverted-0-6" in result.stdout.splitlines()
    assert result.stderr == ""
