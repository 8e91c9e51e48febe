from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from pimerge.core import replacing
from pimerge.core.errors import PimergeError


@pytest.mark.parametrize(
    ("old", "new", "is_replaced"),
    [
        ('{"target": 1, "k": 2}', '{"target": 3}', True),
        ('{"schema_version": 4, "experts": {}}', '{"schema_version": 1, "target": 3}', False),
        ("text,label\na,b\n", "<!DOCTYPE html>", False),
        ('{"target": 1, "base": 2, "experts": []}', '{"target": 1, "split": "test", "scores": []}', False),
        ('{"target": 1', '{"target": 3}', True),  # a document that was cut off
        ("<!DOCTYPE html>old", "<!DOCTYPE html>new", True),
        ("[1, 2]", '{"target": 3}', False),
        ("", "new", True),
    ],
)
def test_force_replaces_files_of_the_same_kind(tmp_path: Path, old: str, new: str, is_replaced: bool) -> None:
    (tmp_path / "f").write_text(old)
    with nullcontext() if is_replaced else pytest.raises(PimergeError, match="of another kind"):
        replacing.require_same_or_absent(tmp_path / "f", new, force=True)
    if old:
        with pytest.raises(PimergeError, match="already exists"):
            replacing.require_same_or_absent(tmp_path / "f", new, force=False)
