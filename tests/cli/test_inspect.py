"""The command ``pimerge inspect``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from pimerge.adapters.expert import open_expert
from pimerge.adapters.expert_files import CONFIG
from pimerge.core.errors import PimergeError
from pimerge.core.files import sha256_file
from pimerge.embedding.store import DIAGONAL, SECOND_MOMENTS, Store
from pimerge.embedding.store_schema import EmbedSettings
from tests.support.cli import raise_from
from tests.support.experts import MakeExpert, raw_expert, set_config, updates_of

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, vit_base: Path, parity_task: Path, make_expert: MakeExpert) -> Path:
    """Two experts alike, one of another init, one that cannot be used; only read here, so made once."""
    folder = tmp_path_factory.mktemp("made") / "experts"
    make_expert(folder / "a", vit_base, parity_task, seed=0)
    make_expert(folder / "b", vit_base, parity_task, seed=1)
    make_expert(folder / "c", vit_base, parity_task, init_seed=9, use_rslora=True)
    set_config(raw_expert(folder / "d", updates_of({"q": (3, 2, 4)})), use_dora=True)
    return folder


@pytest.fixture
def inspect(cli: Cli, pool: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run ``pimerge inspect`` in the folder that holds ./experts."""
    monkeypatch.chdir(pool.parent)
    return lambda *arguments: cli("inspect", *arguments)


def cells(result: Result) -> dict[str, list[str]]:
    """Expert → the words of its row."""
    return {words[0]: words[1:] for line in result.stdout.splitlines()[1:] if (words := line.split())}


def test_the_pool_is_a_table_of_what_each_expert_is(inspect: Cli) -> None:
    result = inspect()
    assert result.exit_code == 0
    rows = cells(result)
    assert list(rows) == ["a", "b", "c", "d"]
    assert rows["a"][0] == "lora"
    assert rows["a"][2:7] == ["4", "8", "4", str(4 * 4 * (16 + 16)), "F32"]
    assert [rows[name][-2:] for name in "abcd"] == [["1/3", "2/3"], ["1/3", "2/3"], ["0/3", "2/3"], ["no", "no"]]
    assert "d: use_dora is on: DoRA" in result.stderr
    assert "a cannot be ranked with c: its init differs" in result.stderr
    assert "\x1b" not in result.output


def test_json_is_one_document(inspect: Cli, pool: Path) -> None:
    result = inspect("experts", "--json")
    document = {entry["expert"]: entry for entry in json.loads(result.stdout)}
    assert result.stderr == ""
    a = document["a"]
    assert a["sha256"] == hashlib.sha256((pool / "a" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert (a["ranks"], a["alphas"], a["modules"], a["parameters"]) == ([4], [8.0], 4, 512)
    assert (a["ranks_with"], a["merges_with"]) == (["b"], ["b", "c"])
    assert a["task"]["labels"] == ["even", "odd"]
    assert [problem["message"] for problem in document["d"]["problems"]] == [
        "use_dora is on: DoRA rescales the rows of W0 + ΔW, which is not linear in B and A"
    ]


def test_quiet_still_says_what_is_wrong_but_no_hints(inspect: Cli) -> None:
    result = inspect("-q")
    assert "d: use_dora is on" in result.stderr
    assert "cannot be ranked" not in result.stderr


def test_one_expert_alone_is_looked_at(inspect: Cli) -> None:
    assert cells(inspect("experts/a"))["a"][-2:] == ["0/0", "0/0"]


def test_another_base_can_be_given(inspect: Cli, bert_base: Path) -> None:
    document = json.loads(inspect("experts/a", "--base", bert_base, "--json").stdout)[0]
    assert document["problems"]
    assert document["ranks_with"] == []


def test_a_pool_that_is_not_there_is_an_error(cli: Cli) -> None:
    result = cli("inspect")
    assert isinstance(result.exception, PimergeError)
    assert "'experts'" in str(result.exception)


def test_help_names_the_options(cli: Cli) -> None:
    result = cli("inspect", "--help")
    assert result.exit_code == 0
    assert all(option in result.stdout for option in ("--json", "--quiet", "--base", "--store"))


@pytest.fixture(scope="module")
def embedded(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which a and b are, of which b has changed since."""
    path = tmp_path_factory.mktemp("store") / "known.json"
    store = Store(path)
    for name in "ab":
        expert = open_expert(pool / name)
        fields = {
            "path": store.path_of(expert),
            "sha256": expert.sha256 if name == "a" else "0",
            "config_sha256": sha256_file(expert.path / CONFIG),
            "task_sha256": "0",
            "kind": expert.kind,
            "base": "b",
            "task": {},
            "settings": EmbedSettings(),
            "examples": 7,
            "tokens": 11,
            "device": "cpu",
            "route": "rules",
            "sketches": {},
        }
        # an information of 2, 4, 6 and 8 for each entry of the four modules
        diagonal = {
            key: torch.full(expert.file.entries[key].shape, 2.0 * place)
            for place, module in enumerate(sorted(expert.modules.values(), key=lambda m: m.name), 1)
            for key in (module.A, module.B)
        }
        store.add(name, fields, {DIAGONAL: diagonal, SECOND_MOMENTS: {}})
    return path


def test_a_store_adds_a_table_of_fisher_information(inspect: Cli, embedded: Path, pool: Path) -> None:
    result = inspect("--store", embedded)
    assert result.exit_code == 0, result.exception
    lines = result.stdout.splitlines()
    title = next(i for i, line in enumerate(lines) if line.startswith("Fisher"))
    rows = {line.split()[0]: line for line in lines[title + 1 :]}
    assert list(rows) == ["a", "b", "c", "d"]
    modules = sorted(open_expert(pool / "a").modules, reverse=True)
    shown = ", ".join(f"{name} {share}" for name, share in zip(modules, ("40.0%", "30.0%", "20.0%"), strict=False))
    assert rows["a"].split(maxsplit=8) == ["a", "7", "true", "2.56e+03", "124", "0.31%", "426.7", "83.33%", shown]
    assert [rows[name].split("–")[-1].strip() for name in "bcd"] == [
        "changed since it was embedded",
        "it is not in the store",
        "it cannot be read",
    ]


def test_json_holds_the_trace_of_every_module(inspect: Cli, embedded: Path) -> None:
    a, b, *_ = json.loads(inspect("--store", embedded, "--json").stdout)
    assert a["fisher"]["trace"] == 512 * 5
    assert a["fisher"]["effective"] == pytest.approx(512 * 25 / 30)
    assert list(a["fisher"]["modules"].values()) == [1024, 768, 512, 256]
    assert (b["fisher"], b["no_fisher"]) == (None, "changed since it was embedded")


def test_a_default_store_that_cannot_be_read_is_left_out(inspect: Cli, pool: Path) -> None:
    store = pool.parent / "embeddings.json"
    store.write_text(json.dumps({"schema_version": 1, "experts": {}}))
    result = inspect()
    assert (result.exit_code, "Fisher " in result.stdout) == (0, False)
    assert "Fisher information is not shown: 'embeddings.json' has the schema version 1" in result.stderr
    with pytest.raises(PimergeError, match="schema version 1"):
        raise_from(inspect("--store", "embeddings.json"))


def test_the_default_store_is_used_only_if_it_is_there(inspect: Cli, cli: Cli, embedded: Path) -> None:
    assert "Fisher" not in inspect().stdout
    with pytest.raises(PimergeError, match=r"'gone\.json'"):
        raise_from(inspect("--store", "gone.json"))


def test_a_default_store_that_is_there_is_read(
    inspect: Cli, embedded: Path, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (embedded.parent / "embeddings.json").write_bytes(embedded.read_bytes())
    monkeypatch.chdir(embedded.parent)
    assert "Fisher" in inspect(pool).stdout
