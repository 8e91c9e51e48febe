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
