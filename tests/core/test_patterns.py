"""Patterns of somebody else, against Python's own re where that ends, and within a limit where it does not."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pimerge.adapters.expert import open_expert
from pimerge.core import confined
from pimerge.core.errors import PimergeError
from pimerge.core.hf_loading import load_adapter, load_adapter_config
from pimerge.core.patterns import is_within, matches, require_bounded
from tests.support.bases import model_for
from tests.support.experts import MakeExpert, set_config

NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", r"self_attn\.q_proj", r".*\.(q|v)_proj", r".*\.\d+\..*proj", "q|q_proj", "^q_proj$", "q.proj"],
)
@pytest.mark.parametrize("ending", [True, False])
def test_patterns_match_what_re_matches(pattern: str, ending: bool) -> None:
    expected = re.match(rf"(.*\.)?({pattern})$", NAME) if ending else re.fullmatch(pattern, NAME)
    assert matches(pattern, NAME, ending) == bool(expected)


@given(st.text("ab.|*\\d+()", max_size=8), st.text("ab.1", max_size=12), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_pattern_matches_what_re_matches(pattern: str, name: str, ending: bool) -> None:
    try:
        expected = bool(re.match(rf"(.*\.)?({pattern})$", name) if ending else re.fullmatch(pattern, name))
    except re.error:
        with pytest.raises(PimergeError, match="not a regular expression"):
            matches(pattern, name, ending)
        return
    assert matches(pattern, name, ending) == expected


@pytest.mark.parametrize("pattern", [r"(([a-z_0-9]+)\.?)+X", "(a+)+$", "(?:a|a)*b", "(a*)*c"])
def test_a_pattern_that_does_not_end_is_refused(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(PimergeError, match="cannot be used"):
        matches(pattern, "a" * 38 + "!", ending=True)
    with pytest.raises(PimergeError, match="cannot be used"):
        require_bounded({"rank_pattern": {pattern: 2}}, ["a" * 38 + "!"])
    assert time.monotonic() - start < 30
    assert matches("(a)(b)?", "ab")


def test_a_fork_starts_a_process_of_its_own() -> None:
    assert matches("(a)(b)?", "ab")
    child = os.fork()
    if not child:
        os._exit(0 if matches("(b)(a)?", "ba") else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert matches("(a)(c)?", "ac")


@pytest.mark.parametrize("saved", ["head", "h.*", "head|score", "a.head", "(head)"])
@pytest.mark.parametrize("name", ["head", "a.head.0", "heads", "score", "b.score.x", "x"])
def test_modules_to_save_are_matched_as_by_peft(saved: str, name: str) -> None:
    assert is_within(saved, name) == bool(re.match(rf"(^|.*\.)(?:{saved})($|\..*)", name))


def test_an_expert_with_such_a_pattern_is_refused_before_peft_sees_it(
    tmp_path: Path, make_expert: MakeExpert, vit_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confined, "SECONDS", 0.3)
    folder = make_expert(tmp_path / "expert", base=vit_base)
    config = json.loads((folder / "adapter_config.json").read_text())
    set_config(folder, alpha_pattern={r"((([a-z_0-9]+)*\.?)+)+X": 4})
    with pytest.raises(PimergeError, match="cannot be used"):
        open_expert(folder)
    set_config(folder, alpha_pattern={}, target_modules=r"((([a-z_0-9]+)*\.?)+)+X")
    with pytest.raises(PimergeError, match="cannot be used"):
        load_adapter(model_for(vit_base), folder)
    set_config(folder, target_modules=config["target_modules"], exclude_modules=r"((([a-z_0-9]+)*\.?)+)+X")
    with pytest.raises(PimergeError, match="cannot be used"):
        load_adapter_config(folder, model_for(vit_base))
