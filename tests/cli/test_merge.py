"""The command ``pimerge merge``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.ranking_document import Candidate, Ranking, Target
from pimerge.core.errors import PimergeError
from pimerge.merging.method import METHODS
from pimerge.tasks.task import open_task
from tests.support.bases import model_for
from tests.support.cli import NAMES, Cli, raise_from
from tests.support.experts import dense_deltas, raw_expert, set_config, updates_of
from tests.support.merging import merge
from tests.support.numerics import logits_of, normal, relative_difference


def rank(
    pool: dict[str, Expert],
    target: str | Path,
    scores: dict[str, float],
    scales: Sequence[float] = (),
    selected: Sequence[str] | None = None,
) -> None:
    """Write a ranking of the working folder, without ``pimerge rank``; a target that is a path is a task's folder."""

    def reference(name: str) -> dict[str, str]:
        return {"name": name, "path": f"experts/{name}", "sha256": pool[name].sha256}

    if isinstance(target, str):
        ranked = Target(**reference(target))
    else:
        path = os.path.relpath(target)
        ranked = Target(name=target.name, path=path, sha256=open_task(target).sha256(), expert=False)
    strengths = scales or [1.0] * len(scores)
    ranking = Ranking(
        target=ranked,
        measure="fisher",
        k=len(scores),
        selected=list(scores) if selected is None else list(selected),
        why="by hand",
        candidates=[
            Candidate(**reference(name), score=score, low=score, high=score, scale=scale)
            for (name, score), scale in zip(scores.items(), strengths, strict=True)
        ],
        not_comparable=[],
    )
    ranking.save(Path("ranking.json"), force=True)


def assert_weights(output: str, pool: dict[str, Expert], weights: dict[str, float], atol: float = 1e-6) -> None:
    """The output's ΔW is the weighted sum of the pool's."""
    found = dense_deltas(open_expert(output))
    dense = {name: dense_deltas(pool[name]) for name in weights}
    for module, delta in found.items():
        expected = torch.stack([weight * dense[name][module] for name, weight in weights.items()]).sum(0)
        torch.testing.assert_close(delta, expected, rtol=0, atol=atol)
    written = json.loads((Path(output) / "coefficients.json").read_text())
    assert [Path(output, path).resolve().name for path in written["experts"]] == list(weights)
    for values in written["weights"].values():
        assert values == pytest.approx(list(weights.values()))


def test_uniform_is_the_mean_of_the_experts_given(cli: Cli, pool: dict[str, Expert]) -> None:
    result = cli("merge", "experts/x", "experts/y", "experts/z", "--head", "average")
    assert result.exit_code == 0, result.output
    assert_weights("merged", pool, dict.fromkeys(NAMES, 1 / 3))
    assert "100.00%" not in result.stdout
    assert "x 0.333, y 0.333, z 0.333" in result.stderr
    assert "next: pimerge eval merged" in result.stderr


@pytest.mark.parametrize("method", [[], ["--method", "interpolated"]])
def test_interpolated_takes_the_weights_in_order(cli: Cli, pool: dict[str, Expert], method: list[str]) -> None:
    arguments = [*method, "--weights", "0.7,-0.2", "--head", "none", "-o", "out"]
    assert cli("merge", "experts/z", "experts/x", *arguments).exit_code == 0
    assert_weights("out", pool, {"z": 0.7, "x": -0.2})


def softmax(*scores: float) -> list[float]:
    """Softmax."""
    values: list[float] = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    return values


def test_uniform_takes_what_the_ranking_selected(cli: Cli, pool: dict[str, Expert], vit_base: Path) -> None:
    rank(pool, "x", {"y": 2.0, "z": 1.0})
    assert cli("merge").exit_code == 0
    assert_weights("merged", pool, {"y": 0.5, "z": 0.5})
    model = PeftModel.from_pretrained(model_for(vit_base), "merged")
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(head, pool["x"].head_tensors()["classifier.weight"])  # the target's own


@pytest.mark.parametrize("alpha", [None, 0.0, 0.4, 1.0])
def test_interpolated_joins_the_targets_own_expert(cli: Cli, pool: dict[str, Expert], alpha: float | None) -> None:
    rank(pool, "x", {"z": 2.0, "y": 1.0})
    given = [] if alpha is None else ["--alpha", alpha]
    result = cli("merge", "--method", "interpolated", *given)
    assert result.exit_code == 0, result.output
    share = 1 / 3 if alpha is None else alpha
    z, y = softmax(2.0, 1.0)
    assert_weights("merged", pool, {"x": share, "z": (1 - share) * z, "y": (1 - share) * y})


def test_coefficients_merge_again_module_by_module(cli: Cli, pool: dict[str, Expert]) -> None:
    modules = sorted(pool["x"].modules)
    weights = {name: [i / 10, 1 - i / 10] for i, name in enumerate(modules)}
    document = {
        "method": "learned",
        "granularity": "matrix",
        "experts": ["../experts/x", "../experts/y"],
        "sha256": [pool["x"].sha256, pool["y"].sha256],
        "experts_trained": False,
        "weights": weights,
    }
    Path("tuned").mkdir()
    Path("tuned/coefficients.json").write_text(json.dumps(document))
    assert cli("merge", "--coefficients", "tuned/coefficients.json", "--target", "experts/x").exit_code == 0
    found, x, y = (dense_deltas(open_expert(name)) for name in ("merged", "experts/x", "experts/y"))
    for name, (first, second) in weights.items():
        torch.testing.assert_close(found[name], first * x[name] + second * y[name], rtol=0, atol=1e-6)
    document["sha256"] = [pool["y"].sha256, pool["x"].sha256]
    Path("tuned/coefficients.json").write_text(json.dumps(document))
    with pytest.raises(PimergeError, match=r"differ from those of 'tuned/coefficients\.json'"):
        raise_from(cli("merge", "--coefficients", "tuned/coefficients.json", "--force"))


def test_the_logits_are_those_of_the_dense_sum(cli: Cli, pool: dict[str, Expert], vit_base: Path) -> None:
    assert cli("merge", "experts/x", "experts/y", "--target", "x", "--head", "none", "-q").exit_code != 0
    assert cli("merge", "experts/x", "experts/y", "--target", "experts/x", "-q").exit_code == 0
    reference = model_for(vit_base)
    weights = reference.state_dict()
    for name in ("x", "y"):
        for module, delta in dense_deltas(pool[name]).items():
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + 0.5 * delta.float()
    reference.load_state_dict(weights | pool["x"].head_tensors())
    batch: dict[str, Tensor] = {"pixel_values": normal(2, 3, 16, 16)}
    found = logits_of(PeftModel.from_pretrained(model_for(vit_base), "merged").eval(), batch)
    torch.testing.assert_close(found, logits_of(reference, batch), rtol=0, atol=1e-5)


def test_a_rank_reports_the_error_of_eckart_and_young(cli: Cli, pool: dict[str, Expert]) -> None:
    result = cli("merge", "experts/x", "experts/y", "--head", "none", "--rank", "1", "--json")
    document = json.loads(result.stdout)
    lost = energy = 0.0
    x, y = dense_deltas(pool["x"]), dense_deltas(pool["y"])
    for name in x:
        singular = torch.linalg.svdvals((x[name] + y[name]) / 2)
        own = float(singular[1:].norm() / singular.norm())
        assert document["modules"][name] == {
            "rank": 1,
            "truncation": pytest.approx(own, rel=1e-6),
            "rounding": 0.0,
        }
        lost, energy = lost + float(singular[1:].square().sum()), energy + float(singular.square().sum())
    assert document["truncation"] == pytest.approx((lost / energy) ** 0.5, rel=1e-6)
    assert open_expert("merged").ranks == (1,)


def test_json_is_one_document_and_nothing_else(cli: Cli, pool: dict[str, Expert]) -> None:
    result = cli("merge", "experts/x", "experts/y", "--head", "none", "--json", "--quiet")
    document = json.loads(result.stdout)
    assert result.stderr == ""
    assert document["experts"] == ["x", "y"]
    assert (document["weights"], document["output"], document["truncation"]) == ([0.5, 0.5], "merged", 0.0)


def test_quiet_leaves_the_table_and_no_hints(cli: Cli, pool: dict[str, Expert]) -> None:
    result = cli("merge", "experts/x", "experts/y", "--head", "none", "-q")
    assert result.stderr == ""
    assert result.stdout.split()[:3] == ["module", "rank", "error"]
    assert "\x1b" not in result.output


def test_the_same_command_gives_the_same_bytes(cli: Cli, pool: dict[str, Expert]) -> None:
    for name in ("one", "two"):
        assert cli("merge", "experts/x", "experts/y", "--head", "average", "-o", name).exit_code == 0
    assert {f.name for f in Path("one").iterdir()} == {f.name for f in Path("two").iterdir()}
    assert all(file.read_bytes() == (Path("two") / file.name).read_bytes() for file in Path("one").iterdir())


def test_dtype_is_that_asked_for(cli: Cli, pool: dict[str, Expert]) -> None:
    for method, dtype, name in (("uniform", "bfloat16", "BF16"), ("ties", "float16", "F16"), ("tsv", "float64", "F64")):
        given = ["--method", method, "--dtype", dtype, "--head", "none", "--force"]
        assert cli("merge", "experts/x", *given).exit_code == 0
        assert open_expert("merged").dtypes == (name,)


def test_a_targets_task_folder_is_enough_without_a_head(cli: Cli, pool: dict[str, Expert], parity_task: Path) -> None:
    result = cli("merge", "experts/x", "experts/y", "--target", parity_task, "--head", "none")
    assert result.exit_code == 0, result.exception
    assert_weights("merged", pool, {"x": 0.5, "y": 0.5})


def contents() -> dict[str, bytes]:
    """Every file below the working folder."""
    return {str(file): file.read_bytes() for file in Path().rglob("*") if file.is_file()}


TWO = ("experts/x", "experts/y")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no ranking 'ranking.json'"),
        ((*TWO, "--method", "unifrom"), "'unifrom'\n.*'uniform'"),
        ((*TWO, "--method", "interpolated"), "'interpolated' needs weights"),
        ((*TWO, "--method", "uniform", "--weights", "0.5,0.5"), "'uniform'"),
        ((*TWO, "--method", "interpolated", "--weights", "1"), r"--weights has 1 numbers for 2 experts \(x, y\)"),
        ((*TWO, "--method", "interpolated", "--weights", "1,nan"), "--weights contains 'nan'"),
        ((*TWO, "--method", "interpolated", "--weights", "1,,2"), "--weights contains ''"),
        ((*TWO, "--method", "interpolated", "--weights", "1,2", "--alpha", "0.5"), "exclude each other"),
        ((*TWO, "--alpha", "0.5"), "--alpha applies to 'fisher' and 'interpolated', not to 'uniform'"),
        ((*TWO, "--rank", "0"), "--rank is '0'"),
        ((*TWO, "--rank", "²"), "--rank is '²'"),
        ((*TWO, "--rank", "-1"), "--rank is '-1'"),
        ((*TWO, "--dtype", "int8"), "--dtype must be one of float32, bfloat16, float16, float64; got 'int8'"),
        ((*TWO, "--head", "mean"), "--head"),
        (TWO, "the target is unknown"),
        ((*TWO, "--target", "nowhere"), "'nowhere'"),
        ((*TWO, "gone", "also/gone"), "gone"),
        ((*TWO, "-o", "experts/x", "--force"), "the output 'experts/x' is the expert 'x' or contains it"),
        ((*TWO, "-o", "experts", "--force"), "the output 'experts' is the expert 'x' or contains it"),
        ((*TWO, "--target", "experts/z", "-o", "experts/z", "--force"), "'experts/z' is the expert 'z'"),
        ((*TWO, "-o", ".", "--force"), "working folder"),
        ((*TWO, "-o", "..", "--force"), "working folder"),
        ((*TWO, "-o", "experts"), "--force"),
        ((*TWO, "-o", "n" * 300), "name is too long"),
        ((*TWO, "--head", "none", "-o", "experts/x/task.json/out"), "a part of the path is a file"),
        ((*TWO, "--coefficients", "gone.json"), "gone.json"),
        ((*TWO, "--coefficients", "experts/x/task.json"), "or the coefficients.json of a merge"),
        ((*TWO, "--coefficients", "c.json", "--weights", "1,2"), "--coefficients excludes"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    arguments: tuple[str, ...], message: str, cli: Cli, pool: dict[str, Expert]
) -> None:
    before = contents()
    with pytest.raises(PimergeError, match=message):
        raise_from(cli("merge", *arguments))
    assert contents() == before


def test_experts_that_do_not_fit_are_named(cli: Cli, pool: dict[str, Expert]) -> None:
    other = raw_expert(Path("experts/other"), updates_of({"q": (3, 2, 4)}))
    with pytest.raises(PimergeError, match="'other' has the base 'org/base'"):
        raise_from(cli("merge", "experts/x", other, "--head", "none"))
    set_config(Path("experts/x"), use_dora=True)
    set_config(Path("experts/y"), r=99)
    with pytest.raises(PimergeError, match=r"(?s)'experts/x'.*'experts/y'"):
        raise_from(cli("merge", *TWO))


def test_force_replaces_the_output(cli: Cli, pool: dict[str, Expert]) -> None:
    assert cli("merge", *TWO, "--head", "none").exit_code == 0
    assert cli("merge", "experts/z", "--head", "none", "--force").exit_code == 0
    assert_weights("merged", pool, {"z": 1.0})
    assert sorted(child.name for child in Path().iterdir()) == ["experts", "merged"]


def test_a_second_run_of_the_same_command_finds_its_output(cli: Cli, pool: dict[str, Expert]) -> None:
    command = ("merge", *TWO, "--head", "none")
    first = json.loads(cli(*command, "--json").stdout)
    before = contents()
    again = cli(*command, "--json")
    assert again.exit_code == 0
    assert {**first, **json.loads(again.stdout)} == first
    assert "'merged' is there already: the same command wrote it" in again.stderr
    assert contents() == before
    for other in ((*TWO[::-1], "--head", "none"), (*TWO, "--head", "none", "--exclude", "*.q_proj")):
        with pytest.raises(PimergeError, match="already exists"):
            raise_from(cli("merge", *other))
    for damaged in ("README.md", "adapter_model.safetensors"):
        file = Path("merged") / damaged
        file.write_bytes(file.read_bytes() + b"!")
        with pytest.raises(PimergeError, match="already exists"):
            raise_from(cli(*command))
        assert cli(*command, "--force").exit_code == 0
    set_config(Path("experts/y"), lora_alpha=99)
    with pytest.raises(PimergeError, match="already exists"):
        raise_from(cli(*command))


def test_force_does_not_replace_a_folder_of_somebody_else(cli: Cli, pool: dict[str, Expert], vit_base: Path) -> None:
    shutil.copytree(vit_base, "base")
    before = contents()
    for folder in ("base", "experts/z"):
        with pytest.raises(PimergeError, match="was not written by pimerge"):
            raise_from(cli("merge", *TWO, "--head", "none", "-o", folder, "--force"))
    Path("empty").mkdir()
    assert cli("merge", *TWO, "--head", "none", "-o", "empty", "--force").exit_code == 0
    shutil.rmtree("empty")
    assert contents() == before


def test_the_program_ends_with_3_and_a_message_on_standard_error_only(cli: Cli, pool: dict[str, Expert]) -> None:
    command = [sys.executable, "-m", "pimerge", "merge", *TWO, "--method", "tis"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "20"})
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: there is no merge method 'tis'\n  → did you mean 'ties'?")
    assert "Traceback" not in done.stderr


def test_wrong_usage_ends_with_2(cli: Cli) -> None:
    assert cli("merge", "--no-such-option").exit_code == 2


def test_help_names_every_method_and_methods_says_what_they_do(cli: Cli) -> None:
    result = cli("merge", "--help")
    assert result.exit_code == 0
    words = " ".join(result.stdout.replace("│", " ").split())
    assert "Combine experts into one without training" in words
    listing = cli("merge", "--methods").stdout
    for method in METHODS:
        assert re.search(rf"\b{method.name}\b", words)
        assert {method.summary, method.formula, method.paper} <= set(re.split(r"  +|\n", listing))


def test_methods_lists_them_with_their_options(cli: Cli) -> None:
    table, listed = cli("merge", "--methods"), json.loads(cli("merge", "--methods", "--json").stdout)
    assert [method["name"] for method in listed] == METHODS.names()
    found = {method["name"]: method for method in listed}
    assert found["ties"]["options"] == {"density": 0.2, "scale": 1.0}
    assert found["uniform"]["options"] == {}
    assert "--density 0.2 --scale 1.0" in table.stdout
    assert "--inner ties" in table.stdout
    assert all(method["summary"] in table.stdout for method in listed)


def document(name: str) -> Any:
    """A JSON file of the output."""
    return json.loads((Path("merged") / name).read_text())


def test_experts_of_the_ranking_are_merged_at_its_scales(cli: Cli, pool: dict[str, Expert]) -> None:
    rank(pool, "x", {"y": 2.0, "z": 1.0}, [0.5, 0.25])
    result = cli("merge", "--verify")
    assert result.exit_code == 0, result.exception
    sentence = "updates with a strength other than 1: 'y' × 0.5, 'z' × 0.25"
    assert sentence in result.stderr
    assert "verified with 'uniform': every expert comes back" in result.stderr
    y, z = dense_deltas(pool["y"]), dense_deltas(pool["z"])
    for name, delta in dense_deltas(open_expert("merged")).items():
        torch.testing.assert_close(delta, (0.5 * y[name] + 0.25 * z[name]) / 2, rtol=0, atol=1e-6)
    assert document("coefficients.json")["scales"] == [0.5, 0.25]
    assert document("pimerge.json")["options"]["scales"] == [0.5, 0.25]
    assert "| y | 0.500 at scale 0.5 |" in Path("merged/README.md").read_text()
    assert sentence in cli("merge", "--dry-run").stdout
    assert [e["scale"] for e in json.loads(cli("merge", "--dry-run", "--json").stdout)["experts"]] == [0.5, 0.25]


@pytest.mark.parametrize("space", ["core", "delta"])
def test_a_nonlinear_method_works_on_the_scaled_updates(cli: Cli, pool: dict[str, Expert], space: str) -> None:
    rank(pool, "x", {"y": 2.0, "z": 1.0}, [0.5, 0.25])
    assert cli("merge", "--method", "ties", "--density", 0.7, "--space", space, "--verify").exit_code == 0
    expected = merge(
        [pool["y"].with_strength(0.5), pool["z"].with_strength(0.25)], [0.5, 0.5], "ties", {"density": 0.7}, space=space
    )
    plain = merge([pool["y"], pool["z"]], [0.5, 0.5], "ties", {"density": 0.7}, space=space)
    found = dense_deltas(open_expert("merged"))
    for scaled, whole in zip(expected, plain, strict=True):
        delta = found[scaled.module.name]
        assert relative_difference(delta, scaled.factors.B.double() @ scaled.factors.A.double()) < 1e-5
        assert relative_difference(delta, whole.factors.B.double() @ whole.factors.A.double()) > 0.1


def test_experts_that_are_named_are_merged_as_they_are(cli: Cli, pool: dict[str, Expert]) -> None:
    rank(pool, "x", {"y": 2.0, "z": 1.0}, [0.5, 0.25])
    result = cli("merge", "experts/y", "experts/z")
    assert result.exit_code == 0
    assert "strength" not in result.stderr
    assert_weights("merged", pool, {"y": 0.5, "z": 0.5})
    assert document("coefficients.json")["scales"] == [1.0, 1.0]
    assert "at scale" not in Path("merged/README.md").read_text()


def test_the_targets_own_expert_keeps_its_strength(cli: Cli, pool: dict[str, Expert]) -> None:
    rank(pool, "x", {"y": 2.0}, [0.5])
    assert cli("merge", "--method", "interpolated", "--alpha", 0.4).exit_code == 0
    x, y = dense_deltas(pool["x"]), dense_deltas(pool["y"])
    for name, delta in dense_deltas(open_expert("merged")).items():
        torch.testing.assert_close(delta, 0.4 * x[name] + 0.6 * 0.5 * y[name], rtol=0, atol=1e-6)
    assert document("coefficients.json")["scales"] == [1.0, 0.5]


def test_coefficients_with_scales_give_the_same_merge_again(cli: Cli, pool: dict[str, Expert]) -> None:
    rank(pool, "x", {"y": 2.0, "z": 1.0}, [0.5, 0.25])
    assert cli("merge").exit_code == 0
    assert cli("merge", "--coefficients", "merged/coefficients.json", "-o", "again").exit_code == 0
    first, again = (Path(name, "adapter_model.safetensors").read_bytes() for name in ("merged", "again"))
    assert first == again
    assert json.loads(Path("again/coefficients.json").read_text())["scales"] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("scales", "message"), [([0.5], "1 scales for 2 experts"), ([0.5, "a"], r"scales\.1"), ([0.5, 1e999], r"scales\.1")]
)
def test_scales_that_do_not_fit_are_refused(scales: list[Any], message: str, cli: Cli, pool: dict[str, Expert]) -> None:
    assert cli("merge", *TWO, "--head", "none").exit_code == 0
    changed = document("coefficients.json") | {"scales": scales}
    Path("changed.json").write_text(json.dumps(changed))
    with pytest.raises(PimergeError, match=message):
        raise_from(cli("merge", "--coefficients", "changed.json", "-o", "again"))


def test_a_ranking_that_expects_no_help_is_not_merged(cli: Cli, pool: dict[str, Expert]) -> None:
    rank(pool, "x", {"y": 2.0, "z": 1.0}, selected=[])
    with pytest.raises(PimergeError, match=r"(?s)expects no expert to help.*'pimerge tune'.*name experts.*--no-gate"):
        raise_from(cli("merge"))
    assert not Path("merged").exists()
    assert cli("merge", *TWO).exit_code == 0
    assert_weights("merged", pool, {"x": 0.5, "y": 0.5})


def test_a_ranking_for_a_task_without_an_expert(cli: Cli, pool: dict[str, Expert], parity_task: Path) -> None:
    rank(pool, parity_task, {"y": 2.0, "z": 1.0}, [0.5, 1.0])
    with pytest.raises(PimergeError, match="the target is unknown"):
        raise_from(cli("merge"))
    for i, given in enumerate(([], ["--target", "parity"], ["--target", parity_task])):
        result = cli("merge", "--head", "none", "-o", f"out{i}", *given)
        assert result.exit_code == 0, result.exception
        assert json.loads(Path(f"out{i}/coefficients.json").read_text())["scales"] == [0.5, 1.0]
    with pytest.raises(PimergeError, match="ranks experts for 'parity', not for 'experts/x'"):
        raise_from(cli("merge", "--target", "experts/x", "-o", "other"))


def test_a_task_that_changed_since_it_was_ranked_is_refused(
    cli: Cli, pool: dict[str, Expert], parity_task: Path
) -> None:
    task = Path(shutil.copytree(parity_task, "task"))
    rank(pool, task, {"y": 2.0})
    changed = json.loads((task / "task.json").read_text()) | {"labels": ["odd", "even"]}
    (task / "task.json").write_text(json.dumps(changed))
    with pytest.raises(PimergeError, match=r"(?s)the task 'task' or its data has changed.*rank --target task' again"):
        raise_from(cli("merge", "--head", "none"))
    with pytest.raises(PimergeError, match=r"ranks experts for 'task', not for '\./task' in its present state"):
        raise_from(cli("merge", "--head", "none", "--target", "./task"))


def test_rounding_and_high_ranks_are_told_with_what_to_do(tmp_path: Path, cli: Cli) -> None:
    shapes = {"q": (90, 40, 80)}
    experts = []
    for seed in range(2):
        updates = {name: (A.bfloat16(), B.bfloat16()) for name, (A, B) in updates_of(shapes, seed).items()}
        experts.append(str(raw_expert(tmp_path / f"e{seed}", updates, lora_alpha=16)))
    plain = cli("merge", *experts, "-o", "plain")
    assert "--dtype float32" not in plain.stderr
    assert "the highest rank is 80: servers limit it" in plain.stderr
    assert "--rank N" in plain.stderr
    weighted = cli("merge", *experts, "--method", "interpolated", "--weights", "0.6,0.4", "-o", "weighted")
    assert re.search(r"rounding to bfloat16 changes ΔW by 0\.1\d%; --dtype float32 avoids it", weighted.stderr)
    assert re.search(r"all +80 +0\.1\d%", weighted.stdout)
    low = cli("merge", *experts, "--rank", "32", "--dtype", "float32", "-o", "low")
    assert "highest rank is" not in low.stderr
    assert "rank 32" in low.stderr
