"""Names of somebody else, as a terminal and a Markdown reader see them."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pimerge.core.shown import cleaned, code, json_cleaned, markdown, one_line

ANY = st.text(st.characters())


@given(ANY)
def test_nothing_that_a_terminal_obeys_stays(text: str) -> None:
    left = {unicodedata.category(letter) for letter in one_line(text)}
    assert not left & {"Cc", "Cs", "Zl", "Zp"}
    assert not {"\u202e", "\u2066", "\u200f"} & set(one_line(text))
    one_line(text).encode()


@given(ANY)
def test_line_breaks_stay_in_messages(text: str) -> None:
    assert cleaned(text).count("\n") == text.count("\n")
    assert "\x1b" not in cleaned(text)


@given(st.dictionaries(ANY, ANY))
def test_json_keeps_its_values(document: dict[str, str]) -> None:
    text = json_cleaned(json.dumps(document, ensure_ascii=False, indent=2))
    assert json.loads(text) == document
    assert cleaned(text) == text


@pytest.mark.parametrize("text", ["x-1_2.b", "éa 日本", "org/model-7b", "mit"])
def test_ordinary_names_stay(text: str) -> None:
    assert cleaned(text) == one_line(text) == markdown(text) == text
    assert code(text) == f"`{text}`"


@given(ANY)
def test_a_cell_of_markdown_stays_one_cell(text: str) -> None:
    for cell in (markdown(text), code(text)):
        assert "\n" not in cell
        assert not cell.replace("\\\\", "").replace(r"\|", "").count("|")
    assert not {"<", ">"} & set(markdown(text))
