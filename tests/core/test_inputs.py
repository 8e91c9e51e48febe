"""What is no file is refused before it is opened."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pimerge.checkpoints.safetensors_file import open_tensors
from pimerge.core.errors import PimergeError
from pimerge.core.files import read_json, sha256_file
from pimerge.embedding.store import Store


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("read", [read_json, sha256_file, open_tensors, Store])
def test_a_pipe_or_a_device_is_refused_and_not_opened(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(PimergeError, match="a pipe, a socket or a device"):
            read(path)
