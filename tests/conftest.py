"""Tiny real models, tasks and experts, made once per test run from configs; nothing comes from the network.

Experts are made by PEFT alone, so that what pimerge reads and writes is tested against PEFT.
"""

from __future__ import annotations

import os
import tempfile

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="pimerge-tests-")  # no cache of the user's own
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers fill the cores: more threads would wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import transformers
from datasets import disable_progress_bars

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
disable_progress_bars()


pytest_plugins = [
    "tests.support.bases",
    "tests.support.image_text_bases",
    "tests.support.tasks",
    "tests.support.experts",
    "tests.support.cli",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The scripts first: they take minutes, and no worker shall be left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_readme.py", "test_digits.py"))
