"""The prefixes of backbones that transformers has."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

from pimerge.checkpoints.backbone_prefixes import BACKBONES


def test_each_is_a_prefix_of_transformers() -> None:
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    stated = {
        prefix for file in files for prefix in re.findall(r'base_model_prefix = "(\w+)"', file.read_text("utf-8"))
    }
    assert stated >= BACKBONES
