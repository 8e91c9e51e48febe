"""Full checkpoints as experts, against dense float64 references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pimerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pimerge.core.errors import PimergeError
from pimerge.merging.checkpoint_merge import MergedTensors, merge_checkpoints
from pimerge.merging.checkpoint_plan import plan_checkpoints
from pimerge.merging.method import open_method
from pimerge.merging.request import HeadPolicy
from tests.support.checkpoints import Tensors, contents, set_checkpoint_config, shaken, tensors
from tests.support.numerics import normal


@pytest.fixture
def experts(bert_base: Path, tmp_path: Path) -> list[Path]:
    """Three fine-tuned copies of the tiny BERT."""
    return [shaken(bert_base, tmp_path / f"expert{seed}", seed) for seed in range(3)]


def merge(
    base: Path, experts: Sequence[Path], weights: Any, method: str, output: Path, **options: Any
) -> MergedTensors:
    """Plan and merge."""
    settings = {name: options.pop(name) for name in ("dtype",) if name in options}
    chosen = open_method(method, options.pop("options", None))
    opened = open_checkpoint(base)
    head = HeadPolicy(options.pop("head", "none"))
    plan = plan_checkpoints(opened, [open_checkpoint(expert) for expert in experts], chosen, head=head, **options)
    if not opened.is_file:
        output.mkdir()
    return merge_checkpoints(plan, weights, chosen, output, **settings)


def float64(value: Tensor) -> Any:
    """As numpy's float64."""
    return value.double().numpy()


def nan_weights(base: Any, deltas: list[Any], weights: list[float]) -> Any:
    """Σ over experts of delta weighted by w_n/‖ΔW_n‖, normalised."""
    scaled = [w / np.linalg.norm(delta) for w, delta in zip(weights, deltas, strict=True)]
    return base + sum(s / sum(scaled) * delta for s, delta in zip(scaled, deltas, strict=True))


def plain_sum(base: Any, deltas: list[Any], weights: list[float]) -> Any:
    """W0 + Σ w_n ΔW_n."""
    return base + sum(w * delta for w, delta in zip(weights, deltas, strict=True))


@pytest.mark.parametrize(
    ("method", "weights", "reference"),
    [
        ("uniform", [1 / 3] * 3, plain_sum),
        ("interpolated", [0.7, 0.5, -0.2], plain_sum),
        ("task-arithmetic", [0.4, 0.4, 0.4], plain_sum),
        ("nan-weights", [0.5, 0.25, 0.25], nan_weights),
    ],
)
def test_linear_methods_match_a_dense_reference(
    method: str, weights: list[float], reference: Any, bert_base: Path, experts: list[Path], tmp_path: Path
) -> None:
    done = merge(bert_base, experts, weights, method, tmp_path / "out")
    base, found = tensors(bert_base), tensors(tmp_path / "out")
    others = [tensors(expert) for expert in experts]
    for key, value in found.items():
        start = float64(base[key])
        wanted = reference(start, [float64(other[key]) - start for other in others], weights)
        assert np.array_equal(wanted.astype("float32"), value.numpy()) or np.allclose(
            wanted, float64(value), rtol=2e-7, atol=1e-9
        )
    assert (done.merged, done.kept) == (len(found), 0)
    transformers.BertModel.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weights", [[1.0], [0.0, 1.0]])
def test_one_expert_at_weight_1_is_its_bytes(dtype: torch.dtype, weights: list[float], tmp_path: Path) -> None:
    """Also where base and expert differ by many orders of magnitude, and of negative zeros."""
    values = [normal(50, seed=seed).double() * 10.0 ** (6 * normal(50, seed=seed + 9).double()) for seed in range(3)]
    paths = []
    for index, value in enumerate(values):
        value[:3] = torch.tensor([-0.0, 0.0, 1e-30])
        paths.append(tmp_path / f"{index}.safetensors")
        save_file({"a": value.clamp(-6e4, 6e4).to(dtype)}, paths[-1])
    merge(paths[0], paths[1:][-len(weights) :], weights, "interpolated", tmp_path / "out.safetensors")
    found = open_checkpoint(tmp_path / "out.safetensors").files[0]
    assert list(found.pieces("a")) == list(open_checkpoint(paths[-1]).files[0].pieces("a"))


def ties(deltas: list[Any], weights: list[float], density: float) -> Any:
    """TIES entry by entry: trim, elect a sign, average those that agree by weight."""
    trimmed = []
    for delta in deltas:
        kept = max(1, int(density * delta.size))
        order = np.argsort(-np.abs(delta).ravel(), kind="stable")[:kept]
        mask = np.zeros(delta.size)
        mask[order] = 1
        trimmed.append(delta * mask.reshape(delta.shape))
    merged = np.zeros_like(deltas[0])
    for place in np.ndindex(merged.shape):
        values = [w * delta[place] for w, delta in zip(weights, trimmed, strict=True)]
        sign = np.sign(sum(values))
        agree = [n for n, value in enumerate(values) if value * sign > 0]
        total = sum(weights[n] for n in agree)
        merged[place] = sum(values[n] for n in agree) / total if agree else 0
    return merged


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_elementwise_methods_see_whole_deltas(
    density: float, bert_base: Path, experts: list[Path], tmp_path: Path
) -> None:
    merge(bert_base, experts, [1.0, 1.0, 1.0], "ties", tmp_path / "out", options={"density": density})
    base, found = tensors(bert_base), tensors(tmp_path / "out")
    others = [tensors(expert) for expert in experts]
    for key, value in found.items():
        start = float64(base[key])
        wanted = start + ties([float64(other[key]) - start for other in others], [1.0] * 3, density)
        assert np.mean(np.abs(wanted - float64(value)) > 1e-6) < 1e-3, key


@pytest.mark.parametrize(
    "method", ["ties", "dare-linear", "dare-ties", "della", "breadcrumbs", "magnitude", "uniform", "task-arithmetic"]
)
def test_methods_run_twice_alike_and_tensors_that_all_share_stay(method: str, bert_base: Path, tmp_path: Path) -> None:
    key = "embeddings.word_embeddings.weight"
    base = tensors(bert_base)

    def same(found: Tensors) -> None:
        found[key] = base[key].clone()

    paths = [shaken(bert_base, tmp_path / f"e{seed}", seed, same) for seed in range(2)]
    for name in ("one", "two"):
        merge(bert_base, paths, [0.5, 0.5], method, tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert torch.equal(tensors(tmp_path / "one")[key], base[key])
    assert not torch.equal(tensors(tmp_path / "one")["pooler.dense.weight"], base["pooler.dense.weight"])


def test_fisher_weighs_each_entry(bert_base: Path, experts: list[Path], tmp_path: Path) -> None:
    files = []
    for index, expert in enumerate(experts):
        values = {key: normal(*value.shape, seed=index).abs() + 0.1 for key, value in tensors(expert).items()}
        files.append(tmp_path / f"fisher{index}.safetensors")
        save_file(values, files[-1])
    merge(bert_base, experts, [1.0, 1.0, 1.0], "fisher", tmp_path / "out", fishers=files, options={"floor": 0.0})
    fishers, others = [load_file(file) for file in files], [tensors(expert) for expert in experts]
    for key, value in tensors(tmp_path / "out").items():
        top = sum(float64(fisher[key]) * float64(other[key]) for fisher, other in zip(fishers, others, strict=True))
        wanted = top / sum(float64(fisher[key]) for fisher in fishers)
        assert np.allclose(wanted, float64(value), atol=1e-5), key
    lacking = {k: v for k, v in load_file(files[0]).items() if k != "pooler.dense.weight"}
    turned = {**lacking, "pooler.dense.weight": normal(3, 5)}
    for changed, found in ((lacking, "lacks"), (turned, "has another shape for")):
        save_file(changed, files[0])
        with pytest.raises(PimergeError) as caught:
            merge(bert_base, experts, [1.0] * 3, "fisher", tmp_path / "no", fishers=files)
        (problem,) = caught.value.problems
        assert problem.message == f"'{files[0]}' {found} pooler.dense.weight"
        assert problem.hint == "pass the Fisher of this checkpoint"
    with pytest.raises(PimergeError, match="one Fisher file per expert; got 0 for 3"):
        merge(bert_base, experts, [1.0] * 3, "fisher", tmp_path / "no")


def test_methods_of_other_spaces_are_refused(bert_base: Path, experts: list[Path], tmp_path: Path) -> None:
    for method in ("tsv", "knots", "core-space", "regmean"):
        with pytest.raises(PimergeError, match=r"full checkpoints: [\s\S]*ties"):
            merge(bert_base, experts, [1.0] * 3, method, tmp_path / "out")


def test_weights_per_tensor_selection_and_dtype(bert_base: Path, experts: list[Path], tmp_path: Path) -> None:
    base, first = tensors(bert_base), tensors(experts[0])
    weights = {key: [1.0, 0.0, 0.0] for key in base}
    done = merge(
        bert_base,
        experts,
        weights,
        "interpolated",
        tmp_path / "out",
        selected=lambda key: "query" in key,
        dtype=torch.bfloat16,
    )
    for key, value in tensors(tmp_path / "out").items():
        assert torch.equal(value, (first if "query" in key else base)[key].bfloat16())
    assert done.merged == 4


@pytest.fixture
def classifiers(bert_base: Path, tmp_path: Path) -> Callable[..., list[Path]]:
    """Classifiers made from the tiny BERT."""

    def make(labels: Sequence[Sequence[str]]) -> list[Path]:
        paths = []
        for seed, names in enumerate(labels):
            torch.manual_seed(seed)
            model = transformers.BertForSequenceClassification.from_pretrained(
                bert_base, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
            )
            model.save_pretrained(tmp_path / f"head{seed}-plain")
            paths.append(shaken(tmp_path / f"head{seed}-plain", tmp_path / f"head{seed}", seed))
        return paths

    return make


def test_heads(bert_base: Path, classifiers: Callable[..., list[Path]], tmp_path: Path) -> None:
    paths = classifiers([["cat", "dog"], ["cat", "dog"]])
    found = [tensors(path) for path in paths]
    done = merge(bert_base, paths, [0.5, 0.5], "uniform", tmp_path / "none")
    assert done.dropped == ("classifier.bias", "classifier.weight")
    assert tensors(tmp_path / "none").keys() == tensors(bert_base).keys()
    key = "encoder.layer.0.attention.self.query.weight"
    wanted = (found[0][f"bert.{key}"].double() + found[1][f"bert.{key}"].double()) / 2
    assert torch.equal(tensors(tmp_path / "none")[key], wanted.float())
    merge(bert_base, paths, [0.5, 0.5], "uniform", tmp_path / "target", head="target", target=1)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "target")
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert torch.equal(model.classifier.weight, found[1]["classifier.weight"])
    assert torch.equal(model.bert.get_parameter(key), wanted.float())
    merge(bert_base, paths, [0.5, 0.5], "uniform", tmp_path / "average", head="average")
    mean = (found[0]["classifier.weight"].double() + found[1]["classifier.weight"].double()) / 2
    assert torch.equal(tensors(tmp_path / "average")["classifier.weight"], mean.float())


def test_heads_of_other_labels_are_not_averaged_nor_merged(
    bert_base: Path, classifiers: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = classifiers([["cat", "dog"], ["good", "bad"], ["a", "b", "c"]])
    with pytest.raises(PimergeError, match=r"different labels: .* \{'0': 'good'"):
        merge(bert_base, paths, [0.3] * 3, "uniform", tmp_path / "out", head="average")
    with pytest.raises(PimergeError, match="which expert is the target's"):
        merge(bert_base, paths, [0.3] * 3, "uniform", tmp_path / "out", head="target")
    done = merge(paths[0], paths[1:], [0.5, 0.5], "uniform", tmp_path / "kept")
    base, kept = tensors(paths[0]), tensors(tmp_path / "kept")
    assert torch.equal(base["classifier.weight"], kept["classifier.weight"])
    assert done.dropped == ("classifier.bias", "classifier.weight")
    merge(paths[0], paths[1:], [0.5, 0.5], "uniform", tmp_path / "replaced", head="target", target=1)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "replaced")
    assert model.classifier.weight.shape == (3, 16)


def test_every_problem_is_reported_at_once(bert_base: Path, tmp_path: Path) -> None:
    def cut(found: Tensors) -> None:
        found["embeddings.word_embeddings.weight"] = normal(5, 16)
        del found["pooler.dense.bias"]

    paths = [shaken(bert_base, tmp_path / "a", 0, cut), shaken(bert_base, tmp_path / "b", 1)]
    with pytest.raises(PimergeError) as error:
        merge(bert_base, paths, [0.5, 0.5], "uniform", tmp_path / "out")
    for part in ("of 'a' has the shape (5, 16)", "'pooler.dense.bias' of the base is missing in a"):
        assert part in str(error.value)
    with pytest.raises(PimergeError, match=r"'b' is of type gpt2, and the base 'bert' of type bert"):
        merge(bert_base, [set_checkpoint_config(paths[1], model_type="gpt2")], [1.0], "uniform", tmp_path / "out")


def test_a_tensor_that_one_expert_lacks_and_no_other_changed_stays(bert_base: Path, tmp_path: Path) -> None:
    def drop(found: Tensors) -> None:
        del found["pooler.dense.bias"]

    def keep(found: Tensors) -> None:
        found["pooler.dense.bias"] = base["pooler.dense.bias"]

    base = tensors(bert_base)
    a, b = shaken(bert_base, tmp_path / "a", 0, drop), shaken(bert_base, tmp_path / "b", 1, keep)
    merge(bert_base, [a, b], [0.5, 0.5], "task-arithmetic", tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")["pooler.dense.bias"], base["pooler.dense.bias"])


def test_tensors_that_no_expert_has_stay(bert_base: Path, tmp_path: Path) -> None:
    def without(found: Tensors) -> None:
        del found["pooler.dense.bias"], found["pooler.dense.weight"]

    paths = [shaken(bert_base, tmp_path / name, seed, without) for seed, name in enumerate("ab")]
    done = merge(bert_base, paths, [0.5, 0.5], "uniform", tmp_path / "out")
    assert torch.equal(tensors(bert_base)["pooler.dense.weight"], tensors(tmp_path / "out")["pooler.dense.weight"])
    assert done.kept == 2


@pytest.mark.parametrize("method", ["uniform", "ties"])
def test_nan_and_inf_are_reported_by_tensor_and_expert(method: str, bert_base: Path, tmp_path: Path) -> None:
    def spoil(found: Tensors) -> None:
        found["pooler.dense.bias"][0] = float("nan")
        found["pooler.dense.weight"][0, 0] = float("inf")

    paths = [shaken(bert_base, tmp_path / "a", 0), shaken(bert_base, tmp_path / "b", 1, spoil)]
    with pytest.raises(PimergeError) as error:
        merge(bert_base, paths, [0.5, 0.5], method, tmp_path / "out")
    for key in ("pooler.dense.bias", "pooler.dense.weight"):
        assert f"'{key}' of 'b' contains NaN or Inf" in str(error.value)


def test_integers_must_be_the_bases(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "xab"]
    for index, path in enumerate(paths):
        save_file({"a": normal(4, seed=index), "n": torch.arange(3) + (index == 2)}, path)
    with pytest.raises(PimergeError, match=r"'n' of 'b\.safetensors' has different integers"):
        merge(paths[0], paths[1:], [0.5, 0.5], "uniform", tmp_path / "out.safetensors")
    merge(paths[0], paths[1:2], [1.0], "uniform", tmp_path / "out.safetensors")


def test_sharded_base_of_another_layout_than_its_experts(bert_base: Path, experts: list[Path], tmp_path: Path) -> None:
    base = tmp_path / "sharded"
    transformers.BertModel.from_pretrained(bert_base).save_pretrained(base, max_shard_size="8KB")
    merge(base, experts, [0.2, 0.3, 0.5], "interpolated", tmp_path / "many")
    merge(bert_base, experts, [0.2, 0.3, 0.5], "interpolated", tmp_path / "one")
    many, one = tensors(tmp_path / "many"), tensors(tmp_path / "one")
    assert all(torch.equal(many[key], one[key]) for key in one)
    opened: Checkpoint = open_checkpoint(tmp_path / "many")
    assert [file.path.name for file in opened.files] == sorted(path.name for path in base.glob("*.safetensors"))


def test_an_untied_expert_of_a_tied_base_is_refused(tmp_path: Path) -> None:
    paths = []
    for tie in (True, False):
        config = transformers.Qwen2Config(
            vocab_size=24,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tie,
        )
        paths.append(tmp_path / str(tie))
        transformers.Qwen2ForCausalLM(config).save_pretrained(paths[-1])
    with pytest.raises(PimergeError, match=r"has its own 'lm_head\.weight'"):
        merge(paths[0], paths[1:], [1.0], "uniform", tmp_path / "out")
    with pytest.raises(PimergeError, match=r"'lm_head\.weight' of the base"):
        merge(paths[1], [paths[0], paths[1]], [0.5, 0.5], "uniform", tmp_path / "out")
