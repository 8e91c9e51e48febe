"""Each option of the command ``pimerge merge``, against dense references."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from pimerge.adapters.expert import Expert, open_expert
from pimerge.core.errors import PimergeError
from pimerge.merging.method import METHODS
from tests.support.bases import model_for
from tests.support.cli import Cli, Shell, raise_from
from tests.support.experts import dense_deltas, edit_tensors, raw_expert
from tests.support.merge_references import REFERENCES
from tests.support.numerics import logits_of, normal
from tests.support.tasks import write_json

TWO = ("experts/a", "experts/b", "--head", "none")


def deltas_of(folder: str = "merged") -> dict[str, Tensor]:
    """Module → dense ΔW."""
    return dense_deltas(open_expert(folder))


def document(name: str, folder: str = "merged") -> Any:
    """A JSON file of an output."""
    return json.loads(Path(folder, name).read_text())


def means(pair: dict[str, Expert]) -> dict[str, Tensor]:
    """(ΔW_a + ΔW_b) / 2."""
    a, b = dense_deltas(pair["a"]), dense_deltas(pair["b"])
    return {name: (a[name] + b[name]) / 2 for name in a}


@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_writes_an_expert_that_peft_loads(
    method: str, cli: Cli, pair: dict[str, Expert], vit_base: Path
) -> None:
    if method in ("fisher", "regmean"):
        with pytest.raises(PimergeError, match="pimerge embed"):
            raise_from(cli("merge", *TWO, "--method", method))
        given = ["--grams"] if method == "regmean" else []
        assert cli("embed", "experts", "--examples", "8", "-q", *given).exit_code == 0
    weights = ["--weights", "0.5,0.5"] if method == "interpolated" else []
    result = cli("merge", *TWO, "--method", method, *weights, "--verify")
    assert result.exit_code == 0, result.exception
    model = PeftModel.from_pretrained(model_for(vit_base), "merged").eval()
    batch = {"pixel_values": normal(2, 3, 16, 16)}
    assert logits_of(model, batch).isfinite().all()
    assert document("pimerge.json")["options"]["method"] == method
    assert document("pimerge.json")["results"]["verified"] < 1e-5


RANKS = ["1", "99", "max", "auto"]
ENERGIES = [("max", 0.7, 0.7), ("2", 0.7, 0.7), ("auto", 0.5, 0.5)]


@pytest.mark.parametrize(
    ("rank", "given", "energy"), [*((rank, None, 0.99 if rank == "auto" else None) for rank in RANKS), *ENERGIES]
)
def test_ranks_and_errors_are_those_of_a_dense_svd(
    rank: str, given: float | None, energy: float | None, cli: Cli, pair: dict[str, Expert]
) -> None:
    result = cli("merge", *TWO, "--rank", rank, *(["--energy", given] if given else []), "--quiet")
    assert result.exit_code == 0, result.exception
    manifest, found = document("pimerge.json")["results"], open_expert("merged")
    lost = total = 0.0
    for name, delta in means(pair).items():
        squares = torch.linalg.svdvals(delta).square()
        squares = squares[squares > 1e-18 * squares[0]]
        shares = squares.cumsum(0) / squares.sum()
        kept = len(squares) if energy is None else 1 + int((shares < energy).sum())
        kept = min(kept, int(rank)) if rank.isdecimal() else kept
        error = float(squares[kept:].sum() / squares.sum()) ** 0.5
        assert found.modules[name].rank == kept == manifest["modules"][name]["rank"]
        assert manifest["modules"][name]["truncation"] == pytest.approx(error, abs=1e-6)
        assert float((deltas_of()[name] - delta).norm() / delta.norm()) == pytest.approx(error, abs=1e-6)
        lost, total = lost + float(squares[kept:].sum()), total + float(squares.sum())
    assert manifest["truncation"] == pytest.approx((lost / total) ** 0.5, abs=1e-6)
    warned = "warning: the truncation drops" in result.stderr
    assert warned == (lost / total > 0.05)
    assert warned or result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "uniform", "--density", "0.5"], r"'uniform' has no option --density\n.*it is for .*ties"),
        (["--method", "ties", "--density", "1.5"], "--density must be above 0 and at most 1; got 1.5"),
        (["--method", "ties", "--density", "nan"], "--density"),
        (["--method", "knots", "--inner", "tsv"], "--inner must be one of ties, linear; got 'tsv'"),
        (["--method", "task-arithmetic", "--scale", "nan"], "--scale must be a finite number"),
        (
            ["--method", "ties", "--scale", "3e38", "--dtype", "bfloat16", "--rank", "1"],
            r"the merged update of module 'vit.*' is too large for torch\.",
        ),
        (
            ["--method", "ties", "--scale", "1e39"],
            r"--scale must be a number of float32; got 1e\+39",
        ),
        (["--method", "interpolated", "--weights", "1"], "--weights"),
        (["--energy", "1.5"], r"--energy is 1\.5"),
        (["--energy", "nan"], "--energy must be a finite number; got nan"),
        (["--space", "delta"], "--space applies to elementwise methods, not to 'uniform'"),
        (["--space", "dense", "--method", "ties"], "--space must be one of core, delta, factors; got 'dense'"),
        (["--include", "*k_proj"], r"--include '\*k_proj' matches none of 4 names"),
        (["--exclude", "*"], "such as .vit.layers.0.attention.q_proj"),
        (["--weight", "c=1", "--method", "ties"], "'c=1' names an unknown expert 'c'"),
        (["--method", "interpolated", "--weight", "a=1"], "'b' has no weight in 4 of 4 modules"),
        (["--method", "uniform", "--weight", "a=1"], "'uniform'"),
        (["-o", "experts/a", "--force"], "'experts/a'"),
    ],
)
def test_what_is_wrong_ends_with_3_and_a_message(
    arguments: list[str], message: str, shell: Shell, pair: dict[str, Expert]
) -> None:
    result = shell("merge", *TWO, *arguments)
    assert (result.code, result.out) == (3, "")
    assert "Traceback" not in result.err
    assert re.search(message, result.err), result.err
    assert not Path("merged").exists()


def test_experts_that_are_nan_or_empty_are_refused(shell: Shell, pair: dict[str, Expert]) -> None:
    key = next(key for key in pair["a"].file.entries if "lora_B" in key)
    edit_tensors(pair["a"].path, lambda tensors: tensors[key].fill_(float("nan")))
    for method in ("uniform", "ties"):
        result = shell("merge", *TWO, "--method", method)
        assert (result.code, Path("merged").exists()) == (3, False)
        assert f"'a': {key} holds" in result.err
    raw_expert(Path("empty"), {})
    result = shell("merge", "empty", "--head", "none")
    assert (result.code, Path("merged").exists()) == (3, False)
    assert "it holds no LoRA factors" in result.err


def test_heads_of_other_labels_are_not_averaged(shell: Shell, pair: dict[str, Expert]) -> None:
    task = json.loads(Path("experts/b/task.json").read_text())
    write_json(Path("experts/b/task.json"), task | {"labels": ["odd", "even"]})
    result = shell("merge", "experts/a", "experts/b", "--head", "average")
    assert result.code == 3
    assert "the head of 'b' has the labels ['odd', 'even'], the head of 'a' has ['even', 'odd']" in result.err


RULES = ["--method", "interpolated", "--weight", "a=1", "--weight", "experts/b=0.5", "--weight", "b:*.v_proj=-2"]


@pytest.mark.parametrize("given", [RULES, ["--coefficients", "w.json"]])
def test_rules_and_files_of_weights_decide_by_module(given: list[str], cli: Cli, pair: dict[str, Expert]) -> None:
    write_json(Path("w.json"), {"a": 1, "experts/b": {"*": 0.5, "*.v_proj": -2.0}})
    result = cli("merge", *TWO, *given)
    assert result.exit_code == 0, result.exception
    written = document("coefficients.json")
    assert (written["method"], written["granularity"]) == ("interpolated", "matrix")
    a, b = dense_deltas(pair["a"]), dense_deltas(pair["b"])
    for name, delta in deltas_of().items():
        share = -2.0 if name.endswith("v_proj") else 0.5
        assert written["weights"][name] == [1.0, share]
        torch.testing.assert_close(delta, a[name] + share * b[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("option", [["--include", "*.q_proj"], ["--exclude", "*.v_proj"]])
def test_include_and_exclude_choose_modules(option: list[str], cli: Cli, pair: dict[str, Expert]) -> None:
    result = cli("merge", *TWO, *option)
    assert result.exit_code == 0
    assert {name.rpartition(".")[2] for name in deltas_of()} == {"q_proj"}
    assert "left out: 2 modules by --include and --exclude" in result.stderr


def test_delta_space_is_the_dense_method(cli: Cli, pair: dict[str, Expert]) -> None:
    assert cli("merge", *TWO, "--method", "ties", "--space", "delta", "--density", "0.3").exit_code == 0
    a, b = dense_deltas(pair["a"]), dense_deltas(pair["b"])
    for name, delta in deltas_of().items():
        expected = REFERENCES["ties"](torch.stack([a[name], b[name]]), [0.5, 0.5], density=0.3)
        torch.testing.assert_close(delta, expected, rtol=0, atol=1e-5)


def test_factors_space_merges_a_and_b_apart(cli: Cli, pair: dict[str, Expert]) -> None:
    assert cli("merge", *TWO, "--method", "magnitude", "--space", "factors", "--density", "1").exit_code == 0
    for name, delta in deltas_of().items():
        parts = [expert.factors(name) for expert in pair.values()]
        A = torch.stack([part.A.double() for part in parts]).mean(0)
        B = torch.stack([part.scaling * part.B.double() for part in parts]).mean(0)
        torch.testing.assert_close(delta, B @ A, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [{"init_seed": 7, "r": 2}, {"r": 3}])
def test_factors_space_needs_one_form_and_one_init(
    config: dict[str, int], cli: Cli, pair: dict[str, Expert], make_expert: Any, vit_base: Path
) -> None:
    make_expert(Path("other"), vit_base, head=False, **config)
    message = "another init" if "init_seed" in config else "its rank is 3"
    with pytest.raises(PimergeError, match=f"'other': .*{message}"):
        raise_from(cli("merge", "experts/a", "other", "--head", "none", "--method", "ties", "--space", "factors"))


def test_a_seed_decides_the_draws(cli: Cli, pair: dict[str, Expert]) -> None:
    for output, seed in (("one", 1), ("again", 1), ("two", 2)):
        assert cli("merge", *TWO, "--method", "dare-linear", "--seed", seed, "-o", output).exit_code == 0
    one, again, two = (Path(name, "adapter_model.safetensors").read_bytes() for name in ("one", "again", "two"))
    assert one == again != two


def test_a_dry_run_says_everything_and_writes_nothing(cli: Cli, pair: dict[str, Expert]) -> None:
    given = ("merge", *TWO, "experts/a", "--method", "ties", "--include", "*.q_proj")
    before = sorted(Path().rglob("*"))
    table, plan = cli(*given, "--dry-run"), json.loads(cli(*given, "--dry-run", "--json").stdout)
    assert sorted(Path().rglob("*")) == before
    assert "nothing is written now" in table.stdout
    assert plan["options"] == {"density": 0.2, "scale": 1.0}
    assert plan["handled"] == ["'a' is given 2 times: its weights are added"]
    assert (plan["modules"], [expert["name"] for expert in plan["experts"]]) == (2, ["a", "b"])
    assert [sentence.partition(":")[0] for sentence in plan["left_out"]] == [
        "2 modules by --include and --exclude, such as 'vit.layers.0.attention.v_proj'",
        "the heads of 'a', 'b'",
    ]
    for sentence in plan["handled"] + plan["left_out"]:
        assert sentence in table.stdout
    assert cli(*given).exit_code == 0
    tensors = load_file("merged/adapter_model.safetensors").values()
    assert plan["size"] >= sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def test_an_expert_given_twice_counts_twice(cli: Cli, pair: dict[str, Expert]) -> None:
    shutil.copytree("experts/a", "copy")
    assert cli("merge", *TWO, "experts/a", "copy").exit_code == 0
    a, b = dense_deltas(pair["a"]), dense_deltas(pair["b"])
    for name, delta in deltas_of().items():
        torch.testing.assert_close(delta, 0.75 * a[name] + 0.25 * b[name], rtol=0, atol=1e-6)
    assert document("coefficients.json")["weights"][name] == [0.75, 0.25]


def test_verify_says_the_deviation_and_the_card_names_sources(cli: Cli, pair: dict[str, Expert]) -> None:
    for name in "ab":
        Path(f"experts/{name}/README.md").write_text("---\nlicense: mit\n---\n")
    result = cli("merge", *TWO, "--method", "ties", "--verify")
    assert "verified with 'interpolated': every expert comes back to within " in result.stderr
    card = Path("merged/README.md").read_text()
    assert "license: mit" in card
    assert all(expert.sha256 in card for expert in pair.values())
    assert "density 0.2, scale 1.0, space core, seed 0" in card
