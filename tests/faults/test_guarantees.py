"""Every guarantee in the documentation names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_guarantee_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    promises = re.findall(r"^- (?:.|\n(?!- |\n))*", text, flags=re.MULTILINE)
    assert len(promises) > 15
    for promise in promises:
        named = re.search(r"`(tests/\S+\.py)::(\w+)`", promise)
        assert named, promise
        assert f"\ndef {named[2]}(" in (ROOT / named[1]).read_text(encoding="utf-8"), promise
