"""The model card of an output, read as the Hub reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

from pimerge.adapters.model_card import CARD_FILE, UNKNOWN, Source, card, licence_of


def source(name: str, licence: str = UNKNOWN) -> Source:
    """What went in."""
    return Source(name, "0" * 64, licence, "0.500")


def written(folder: Path, licences: list[str], **changed: Any) -> tuple[dict[str, Any], str]:
    """The front matter as the Hub reads it, and the whole text."""
    sources = [source(f"e{index}", licence) for index, licence in enumerate(licences)]
    settings = {
        "base": "org/some: base #1",
        "method": "ties",
        "summary": "Trim: elect.",
        "options": {"density": 0.2, "scale": 1.0},
        "truncation": "nothing is lost.",
        "loading": "\nimport peft\n",
    }
    text = card(sources=sources, **(settings | changed))
    (folder / CARD_FILE).write_text(text)
    metadata = metadata_load(folder / CARD_FILE)
    assert metadata is not None
    return metadata, text


@pytest.mark.parametrize(
    ("licences", "stated"),
    [
        (["mit", "mit"], "mit"),
        (["apache-2.0"], "apache-2.0"),
        (["mit", "apache-2.0"], None),
        (["mit", UNKNOWN], None),
        ([UNKNOWN, UNKNOWN], None),
    ],
)
def test_a_licence_is_stated_only_where_all_sources_share_it(
    licences: list[str], stated: str | None, tmp_path: Path
) -> None:
    metadata, text = written(tmp_path, licences)
    assert metadata.get("license") == stated
    assert licence_of(tmp_path) == (stated or UNKNOWN)
    for index, licence in enumerate(licences):
        assert f"| e{index} | 0.500 | {licence} | `{'0' * 64}` |" in text


def test_the_front_matter_is_yaml_whatever_the_base_is_called(tmp_path: Path) -> None:
    metadata, text = written(tmp_path, ["mit"])
    assert metadata["base_model"] == "org/some: base #1"
    assert (metadata["library_name"], metadata["tags"]) == ("peft", ["merge", "pimerge", "lora"])
    assert "# some: base #1, merged by ties" in text
    assert "An adapter merged from 1 expert for the base" in text
    metadata, text = written(tmp_path, ["mit", "mit"], kind=None)
    assert (metadata["library_name"], metadata["tags"]) == ("transformers", ["merge", "pimerge"])
    assert "A model merged from 2 experts for the base" in text


def test_method_options_truncation_and_loading_are_in_the_text(tmp_path: Path) -> None:
    _, text = written(tmp_path, ["mit"])
    for line in (
        "- **Method**: `ties`. Trim: elect.",
        "- **Options**: density 0.2, scale 1.0",
        "- **Truncation**: nothing is lost.",
        "```python\nimport peft\n```",
    ):
        assert line in text
    assert "- **Options**: none" in written(tmp_path, ["mit"], options={})[1]


@pytest.mark.parametrize(
    ("content", "licence"),
    [
        ("---\nlicense: mit\n---\ntext", "mit"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense:\n---\n", UNKNOWN),
        ("---\ntags: [a]\n---\n", UNKNOWN),
        ("no front matter", UNKNOWN),
        ("", UNKNOWN),
        ("---\n- a\n- b\n---\n", UNKNOWN),
        ("---\na: [\n---\n", UNKNOWN),
        (b"---\nlicense: \xff\xfe\n---\n", UNKNOWN),
    ],
)
def test_the_licence_of_a_folder_is_what_its_card_says(content: str | bytes, licence: str, tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert licence_of(tmp_path) == licence


def test_a_folder_without_a_card_states_no_licence(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == licence_of(tmp_path / "gone") == UNKNOWN


def test_names_of_sources_are_no_markup(tmp_path: Path) -> None:
    name = "a|b\n# <img src=x onerror=alert(1)> [c](http://d) \x1b[31m"
    text = card(
        base=f"org/{name}",
        sources=[Source(name, "0", name, "1.0")],
        method="ties",
        summary="Trim.",
        options={"density": name},
        truncation="nothing is lost.",
        loading="import peft",
    )
    body = text.split("\n---\n", 1)[1]
    assert "<img" not in body.replace("`org/a", "").partition("| source")[2]
    assert "\x1b" not in body
    assert "\n# <" not in body
    (row,) = (line for line in body.splitlines() if line.startswith("| a"))
    assert row.replace(r"\|", "").count("|") == 5


def test_a_card_of_aliases_or_of_any_size_is_read_in_no_time(tmp_path: Path) -> None:
    lists = "\n".join(f"a{index}: &a{index} [{', '.join([f'*a{index - 1}'] * 9)}]" for index in range(1, 12))
    (tmp_path / CARD_FILE).write_text(f"---\na0: &a0 [x]\n{lists}\nlicense: *a11\n---\n")
    assert licence_of(tmp_path) == UNKNOWN
    (tmp_path / CARD_FILE).write_text("---\nlicense: " + "[" * 3000 + "]" * 3000 + "\n---\n")
    assert licence_of(tmp_path) == UNKNOWN
    (tmp_path / CARD_FILE).write_text("---\nlicense: mit\nmodel-index:\n" + "- name: x\n" * 20000 + "---\ntext")
    assert licence_of(tmp_path) == "mit"
    (tmp_path / CARD_FILE).write_text("---\nlicense: [mit, apache-2.0]\n---\n")
    assert licence_of(tmp_path) == "mit, apache-2.0"
