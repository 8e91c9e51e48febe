"""The command ``pimerge merge`` on full checkpoints, against dense references."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pimerge.core.errors import PimergeError
from tests.support.checkpoints import set_checkpoint_config, shaken, tensors
from tests.support.cli import Cli, Shell
from tests.support.experts import raw_expert, updates_of
from tests.support.merge_references import REFERENCES
from tests.support.numerics import normal

TWO = ("a", "b")


@pytest.fixture
def two(cli: Cli, bert_base: Path) -> list[dict[str, Tensor]]:
    """Two fine-tuned copies of the tiny BERT in ./a and ./b; the tensors of the base and of both."""
    return [tensors(bert_base), *(tensors(shaken(bert_base, Path(name), seed)) for seed, name in enumerate(TWO))]


def assert_merged(
    found: dict[str, Tensor], two: list[dict[str, Tensor]], method: str, *given: Any, **options: Any
) -> None:
    """Each tensor is that of the base plus the method's merged update."""
    base, *experts = two
    for key, value in base.items():
        deltas = torch.stack([expert[key].double() - value.double() for expert in experts])
        wanted = value.double() + REFERENCES[method](deltas, *given, **options)
        torch.testing.assert_close(found[key].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "arguments", "weights", "options"),
    [
        ("uniform", [], [0.5, 0.5], {}),
        ("interpolated", ["--weights", "0.7,-0.2"], [0.7, -0.2], {}),
        ("task-arithmetic", ["--scale", "0.3"], [1.0, 1.0], {"scale": 0.3}),
        ("nan-weights", [], [0.5, 0.5], {}),
        ("slerp", [], [0.5, 0.5], {}),
        ("ties", ["--density", "0.4"], [0.5, 0.5], {"density": 0.4}),
        ("magnitude", ["--density", "0.4", "--weights", "1,0.5"], [1.0, 0.5], {"density": 0.4}),
        ("breadcrumbs", ["--density", "0.8", "--gamma", "0.1"], [0.5, 0.5], {"density": 0.8, "gamma": 0.1}),
    ],
)
def test_methods_match_their_dense_references(
    method: str,
    arguments: list[str],
    weights: list[float],
    options: dict[str, float],
    cli: Cli,
    two: list[dict[str, Tensor]],
    bert_base: Path,
) -> None:
    result = cli("merge", *TWO, "--base", bert_base, "--method", method, *arguments)
    assert result.exit_code == 0, result.exception
    assert_merged(tensors(Path("merged")), two, method, weights, **options)
    transformers.BertModel.from_pretrained("merged")
    manifest = json.loads(Path("merged/pimerge.json").read_text())
    assert manifest["results"] == {"merged": len(two[0]), "kept": 0, "dropped": []}
    assert (manifest["options"]["method"], manifest["options"]["weights"]) == (method, weights)
    assert f"merged by {method}" in Path("merged/README.md").read_text()


def test_dare_keeps_entries_by_the_seed(cli: Cli, two: list[dict[str, Tensor]], bert_base: Path) -> None:
    found = {}
    for output, seed in (("one", 1), ("again", 1), ("two", 2)):
        given = ["--method", "dare-linear", "--density", "0.5", "--seed", seed, "-o", output]
        assert cli("merge", *TWO, "--base", bert_base, *given).exit_code == 0
        found[output] = tensors(Path(output))
    assert all(torch.equal(value, found["again"][key]) for key, value in found["one"].items())
    assert any(not torch.equal(value, found["two"][key]) for key, value in found["one"].items())
    kept = []
    for key, value in found["one"].items():
        base, a, b = (part[key].double() for part in two)
        delta = value.double() - base
        sums = torch.stack([torch.zeros_like(a), a - base, b - base, a + b - 2 * base])  # each kept or not, / 0.5 · 0.5
        nearest = (sums - delta).abs().min(0)
        assert nearest.values.max() < 1e-5
        kept.append(nearest.indices.flatten())
    shares = torch.bincount(torch.cat(kept), minlength=4) / sum(len(part) for part in kept)
    assert (shares - 0.25).abs().max() < 0.03


def test_fisher_takes_a_file_for_each(shell: Shell, two: list[dict[str, Tensor]], bert_base: Path) -> None:
    fishers: list[dict[str, Tensor]] = []
    for seed, name in enumerate(TWO):
        fishers.append({key: normal(*value.shape, seed=seed).square() for key, value in two[0].items()})
        save_file(fishers[-1], f"{name}.fisher.safetensors")
    given = ["--base", bert_base, "--method", "fisher"]
    missing = shell("merge", *TWO, *given, "--fisher", "a.fisher.safetensors")
    assert missing.code == 3
    assert "'fisher' needs one Fisher file per expert; got 1 for 2 experts" in missing.err
    files = ["--fisher", "a.fisher.safetensors", "--fisher", "b.fisher.safetensors"]
    assert shell("merge", *TWO, *given, *files).code == 0
    found = tensors(Path("merged"))
    for key in two[0]:
        part = [{key: tensors_of[key]} for tensors_of in two]
        assert_merged({key: found[key]}, part, "fisher", [0.5, 0.5], fishers=torch.stack([f[key] for f in fishers]))


def test_weights_go_by_tensor(cli: Cli, two: list[dict[str, Tensor]], bert_base: Path) -> None:
    rules = ["--weight", "a=1", "--weight", "b=0", "--weight", "b:*.layer.1.*=0.5"]
    result = cli("merge", *TWO, "--base", bert_base, "--method", "interpolated", *rules)
    assert result.exit_code == 0, result.exception
    base, a, b = two
    for key, value in tensors(Path("merged")).items():
        share = 0.5 if ".layer.1." in key else 0.0
        wanted = a[key].double() + share * (b[key].double() - base[key].double())
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("option", [("--include", "*query*"), ("--exclude", "*[!y].weight")])
def test_tensors_that_are_not_selected_are_the_bases(
    option: tuple[str, str], cli: Cli, two: list[dict[str, Tensor]], bert_base: Path
) -> None:
    assert cli("merge", *TWO, "--base", bert_base, *option).exit_code == 0
    changed = {key for key, value in tensors(Path("merged")).items() if not torch.equal(value, two[0][key])}
    included = option[0] == "--include"
    assert changed == {key for key in two[0] if ("query" in key if included else key.endswith(("y.weight", "bias")))}


def test_a_dry_run_says_what_would_be_done(cli: Cli, two: list[dict[str, Tensor]], bert_base: Path) -> None:
    before = sorted(Path().rglob("*"))
    given = ["merge", *TWO, "--base", bert_base, "--include", "*query*", "--dry-run"]
    table, document = cli(*given), json.loads(cli(*given, "--json").stdout)
    assert sorted(Path().rglob("*")) == before
    assert "4 tensors by 'uniform'" in table.stdout
    assert "nothing is written now" in table.stdout
    assert (document["merged"], len(document["kept"])) == (4, len(two[0]) - 4)
    assert document["size"] == sum(value.numel() * value.itemsize for value in two[0].values())
    assert [expert["name"] for expert in document["experts"]] == list(TWO)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_nothing_left_to_merge_is_an_error(
    dry: list[str], shell: Shell, two: list[dict[str, Tensor]], bert_base: Path
) -> None:
    result = shell("merge", *TWO, "--base", bert_base, "--exclude", "*", *dry)
    assert (result.code, Path("merged").exists()) == (3, False)
    assert "no tensor is left to merge" in result.err


def test_what_does_not_go_with_checkpoints_is_said_at_once(
    shell: Shell, two: list[dict[str, Tensor]], bert_base: Path
) -> None:
    raw_expert(Path("adapter"), updates_of({"q": (3, 2, 4)}))
    result = shell("merge", *TWO, "adapter", "--rank", "2", "--space", "delta", "--verify", "--alpha", "0.5")
    assert (result.code, Path("merged").exists()) == (3, False)
    for said in (
        "--rank applies to adapters, and the experts are full checkpoints",
        "--space applies to adapters",
        "--verify applies to adapters",
        "--alpha applies to adapters",
        "'adapter' is not a full checkpoint, but others are",
        "full checkpoints are merged relative to their base, and none is given",
    ):
        assert said in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "tsv"], "'tsv' needs low-rank updates or their inputs"),
        (["--method", "interpolated"], "'interpolated' needs weights"),
        (["--method", "interpolated", "--weights", "1"], "--weights"),
        (["--method", "interpolated", "--weight", "c=1"], "'c=1'"),
        (["--density", "0.5"], "--density"),
        (["--include", "*nothing*"], "--include '*nothing*' matches none of"),
        (["--dtype", "int8"], "--dtype"),
        (["--target", "c"], "the target 'c' is not one of the given checkpoints"),
        (["-o", "a", "--force"], "the checkpoint 'a'"),
        (["--base", "org/gone"], "'org/gone'"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    arguments: list[str], message: str, shell: Shell, two: list[dict[str, Tensor]], bert_base: Path
) -> None:
    base = [] if "--base" in arguments else ["--base", bert_base]
    result = shell("merge", *TWO, *base, *arguments)
    assert (result.code, Path("merged").exists()) == (3, False)
    assert message in result.err


def test_a_target_is_one_checkpoint_though_two_have_its_name(
    shell: Shell, two: list[dict[str, Tensor]], bert_base: Path
) -> None:
    for run, name in zip("xy", TWO, strict=True):
        shutil.copytree(name, Path(run) / "checkpoint-5")
    command = ["merge", "x/checkpoint-5", "y/checkpoint-5", "--base", bert_base, "--target"]
    refused = shell(*command, "checkpoint-5")
    assert (refused.code, Path("merged").exists()) == (3, False)
    assert "2 of the given checkpoints have the name 'checkpoint-5' of the target" in refused.err
    assert "x/checkpoint-5, y/checkpoint-5" in refused.err
    assert shell(*command, "y/checkpoint-5").code == 0


def test_another_model_is_refused(shell: Shell, two: list[dict[str, Tensor]], bert_base: Path) -> None:
    set_checkpoint_config(Path("b"), model_type="roberta")
    result = shell("merge", *TWO, "--base", bert_base)
    assert result.code == 3
    assert "'b' is of type roberta, and the base 'bert' of type bert" in result.err


def test_single_files_without_a_base_are_averaged_number_by_number(cli: Cli, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    files = [{"a": torch.randn(4, 5, generator=generator), "b": torch.randn(3, generator=generator)} for _ in range(2)]
    fishers = [{key: torch.rand(tensor.shape, generator=generator) for key, tensor in file.items()} for file in files]
    for number, (file, fisher) in enumerate(zip(files, fishers, strict=True)):
        save_file(file, tmp_path / f"{number}.safetensors")
        save_file(fisher, tmp_path / f"f{number}.safetensors")
    names = ["0.safetensors", "1.safetensors"]

    def merged(*arguments: str) -> dict[str, torch.Tensor]:
        result = cli("merge", *names, *arguments, "--output", "out", "--force")
        assert result.exit_code == 0, result.exception
        return load_file(tmp_path / "out" / "0.safetensors")

    uniform, weighted = merged(), merged("--method", "interpolated", "--weights", "0.2,0.8")
    by_fisher = merged("--method", "fisher", "--fisher", "f0.safetensors", "--fisher", "f1.safetensors", "--floor", "0")
    for key in files[0]:
        first, second = (file[key] for file in files)
        torch.testing.assert_close(uniform[key], (first + second) / 2)
        torch.testing.assert_close(weighted[key], 0.2 * first + 0.8 * second)
        total = fishers[0][key] + fishers[1][key]
        torch.testing.assert_close(by_fisher[key], (fishers[0][key] * first + fishers[1][key] * second) / total)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "load_file" in card
    save_file({"a": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    for arguments, named in (
        ([*names, "--method", "ties"], "merge single .safetensors files without one"),
        ([*names, "--method", "interpolated", "--weights", "0.2,0.3"], "the weights must sum to 1; got 0.5"),
        ([names[0], "other.safetensors"], "other.safetensors"),
    ):
        result = cli("merge", *arguments, "--output", "none")
        assert isinstance(result.exception, PimergeError)
        assert any(named in str(problem) for problem in [result.exception, *result.exception.problems])
