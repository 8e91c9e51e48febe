"""The command ``pimerge embed``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from pimerge.adapters.expert import open_expert
from pimerge.embedding import embed_expert as embedding
from tests.support.cli import Finished, Shell
from tests.support.experts import MakeExpert, edit_tensors
from tests.support.tasks import write_json

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, vit_base: Path, parity_task: Path) -> Path:
    folder = tmp_path_factory.mktemp("made") / "experts"
    for seed, name in enumerate(NAMES):
        make_expert(folder / name, vit_base, parity_task, seed=seed)
    return folder


@pytest.fixture
def pool(tmp_path: Path, made: Path) -> Path:
    """./experts, as deep as they were made, so that their tasks are found."""
    return Path(shutil.copytree(made, tmp_path / "experts"))


@pytest.fixture
def embed(shell: Shell) -> Shell:
    """``pimerge embed`` on a few examples."""

    def run(*arguments: object) -> Finished:
        return shell("embed", *arguments, "--examples", 8)

    return run


def test_every_expert_of_the_default_pool_is_embedded(pool: Path, embed: Shell, tmp_path: Path) -> None:
    result = embed()
    assert result.code == 0
    store = json.loads((tmp_path / "embeddings.json").read_text())
    assert list(store["experts"]) == list(NAMES)
    for name in NAMES:
        with (
            safe_open(tmp_path / store["experts"][name]["sidecars"]["diagonal"]["file"], "pt") as sidecar,
            safe_open(pool / name / "adapter_model.safetensors", "pt") as adapter,
        ):
            factors = {key for key in adapter.keys() if ".lora_" in key}  # noqa: SIM118
            assert set(sidecar.keys()) == factors
        assert name in result.out
    assert "next: pimerge rank" in result.err
    assert "next:" not in result.out


def test_json_is_one_document_and_nothing_else(pool: Path, embed: Shell, tmp_path: Path) -> None:
    result = embed("--json")
    document = result.document
    assert document["store"] == "embeddings.json"
    assert document["computed"] == list(NAMES)
    assert document["skipped"] == []
    store = json.loads((tmp_path / "embeddings.json").read_text())["experts"]
    for name in NAMES:
        assert document["experts"][name]["norm"] == store[name]["norm"]
        assert document["experts"][name]["examples"] == 8


def test_quiet_says_nothing_but_the_result(pool: Path, embed: Shell) -> None:
    result = embed("--quiet")
    assert result.err == ""
    assert all(name in result.out for name in NAMES)


def test_unchanged_experts_are_not_computed_again(pool: Path, embed: Shell, tmp_path: Path) -> None:
    embed()
    before = (tmp_path / "embeddings.json").read_bytes()
    again = embed("--json")
    assert again.document["computed"] == []
    assert again.err.count("unchanged since it was embedded") == 3
    assert (tmp_path / "embeddings.json").read_bytes() == before
    assert embed("--json", "--force").document["computed"] == list(NAMES)
    assert (tmp_path / "embeddings.json").read_bytes() == before


def test_an_interrupted_pool_goes_on_where_it_was(
    pool: Path, embed: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    fisher = embedding.diagonal_fisher

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fisher(*arguments, **options)

    monkeypatch.setattr(embedding, "diagonal_fisher", interrupted)
    assert embed().code == 130
    assert list(json.loads((tmp_path / "embeddings.json").read_text())["experts"]) == ["a"]
    assert embed("--json").document["computed"] == ["b", "c"]
    assert len(calls) == 4


def test_an_expert_whose_folder_is_gone_is_dropped(pool: Path, embed: Shell, tmp_path: Path) -> None:
    embed()
    shutil.rmtree(pool / "b")
    result = embed()
    assert "b: its folder is gone; removed from the store" in result.err
    assert list(json.loads((tmp_path / "embeddings.json").read_text())["experts"]) == ["a", "c"]
    assert not list((tmp_path / "embeddings").glob("b.*"))


def test_single_experts_extend_the_store(pool: Path, embed: Shell, tmp_path: Path) -> None:
    embed("experts/c", "experts/a")
    assert list(json.loads((tmp_path / "embeddings.json").read_text())["experts"]) == ["a", "c"]
    assert embed("experts/b", "--json").document["computed"] == ["b"]
    assert list(json.loads((tmp_path / "embeddings.json").read_text())["experts"]) == list(NAMES)


def break_experts(pool: Path) -> None:
    (pool / "a" / "adapter_model.safetensors").write_bytes(b"short")
    (pool / "b" / "task.json").unlink()


def test_all_broken_experts_are_named_and_none_is_embedded(pool: Path, embed: Shell, tmp_path: Path) -> None:
    break_experts(pool)
    result = embed()
    assert result.code == 3
    assert result.out == ""
    assert "experts/a" in result.err
    assert "truncated" in result.err
    assert "experts/b" in result.err
    assert "task.json" in result.err
    assert "--skip-broken" in result.err
    assert not (tmp_path / "embeddings.json").exists()


def test_broken_experts_can_be_skipped(pool: Path, embed: Shell) -> None:
    break_experts(pool)
    result = embed("--skip-broken", "--json", "--quiet")
    assert result.code == 0
    assert result.document["computed"] == ["c"]
    assert len(result.document["skipped"]) == 2
    assert result.err.count("skipped") == 2


def test_nan_in_an_expert_is_named(pool: Path, embed: Shell) -> None:
    def spoil(tensors: Any) -> None:
        next(iter(tensors.values())).fill_(float("nan"))

    edit_tensors(pool / "a", spoil)
    result = embed()
    assert result.code == 3
    assert "NaN or Inf" in result.err


def test_two_experts_of_one_name_are_told_apart_by_their_paths(pool: Path, embed: Shell, tmp_path: Path) -> None:
    shutil.copytree(pool, tmp_path / "others")
    result = embed("experts/a", "others/a")
    assert result.code == 0, result.err
    assert sorted(json.loads((tmp_path / "embeddings.json").read_text())["experts"]) == ["experts/a", "others/a"]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["nowhere/./at all"], 3, "'nowhere/at all'"),
        (["--labels", "flase"], 3, "--labels must be true or sampled; got 'flase'"),
        (["--dtype", "half"], 3, "'half'"),
        (["--device", "gpu"], 3, "'gpu'"),
        (["--shots", "1000"], 3, "'even'"),
        (["--batch-tokens", "0"], 2, "--batch-tokens"),
        (["--no-such-option"], 2, "--no-such-option"),
    ],
)
def test_wrong_input_ends_with_its_code_and_a_message(
    pool: Path, embed: Shell, arguments: list[str], code: int, expected: str
) -> None:
    result = embed(*arguments)
    assert result.code == code
    assert result.out == ""
    assert expected in result.err
    assert "Traceback" not in result.err


def test_a_store_of_something_else_is_refused_and_kept(pool: Path, embed: Shell, tmp_path: Path) -> None:
    write_json(tmp_path / "embeddings.json", {"mine": 1})
    result = embed()
    assert result.code == 3
    assert "embeddings.json" in result.err
    assert json.loads((tmp_path / "embeddings.json").read_text()) == {"mine": 1}


def test_a_loop_says_why(
    embed: Shell, make_expert: MakeExpert, bert_base: Path, text_task: Path, tmp_path: Path
) -> None:
    make_expert(tmp_path / "experts" / "w", bert_base, text_task, target_modules=["word_embeddings"])
    result = embed()
    assert result.code == 0
    assert "w: one example at a time, since no rule covers" in result.err
    assert "loop" in result.out


def test_texts_that_are_cut_are_counted(embed: Shell, make_expert: MakeExpert, bert_base: Path, tmp_path: Path) -> None:
    task = tmp_path / "task"
    task.mkdir()
    rows = [{"text": "cat " * 30, "label": 0}, {"text": "a dog", "label": 1}]
    (task / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(
        task / "task.json", {"type": "text-classification", "data": {"train": "train.jsonl"}, "labels": ["c", "d"]}
    )
    make_expert(tmp_path / "experts" / "w", bert_base, task)
    assert "w: 1 examples exceed the model's maximum length and were cut" in embed().err


def test_grams_are_stored_beside_the_embeddings_and_go_with_them(pool: Path, embed: Shell, tmp_path: Path) -> None:
    embed()
    plain = json.loads((tmp_path / "embeddings.json").read_text())["experts"]
    result = embed("--grams", "--json")
    assert result.document["computed"] == list(NAMES)
    folder = tmp_path / "embeddings"
    size = sum(file.stat().st_size for file in folder.glob("*.grams.*.safetensors"))
    assert f"Gram matrices: {size / 1e6:.1f} MB" in result.err
    assert embed("--json").document["computed"] == []
    with_grams = json.loads((tmp_path / "embeddings.json").read_text())["experts"]
    for name in NAMES:
        with safe_open(tmp_path / with_grams[name]["sidecars"]["grams"]["file"], "pt") as sidecar:
            assert set(sidecar.keys()) == set(open_expert(pool / name).modules)
            assert {tuple(sidecar.get_slice(key).get_shape()) for key in sidecar.keys()} == {(16, 16)}  # noqa: SIM118
        changed = {key for key, value in with_grams[name].items() if value != plain[name][key]}
        assert changed == {"sidecars"}
        assert with_grams[name]["sidecars"].pop("grams")["file"].startswith(f"embeddings/{name}.grams.")
        assert with_grams[name]["sidecars"] == plain[name]["sidecars"]
    shutil.rmtree(pool / "b")
    embed("--quiet")
    assert sorted(file.name for file in folder.glob("b.*")) == []
