"""What pimerge writes, loaded by PEFT and compared with the base that has the dense updates in its weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.head import NO_HEAD, Head, choose_head, task_of
from pimerge.adapters.low_rank import Truncation
from pimerge.adapters.writer import Coefficients, Documents, Layout, write_expert
from pimerge.core.errors import PimergeError
from pimerge.core.manifest import Manifest, inputs_of, library_versions
from pimerge.merging.method import open_method
from pimerge.merging.preparation import prepare
from pimerge.merging.update_merge import UpdateSettings
from pimerge.tasks.task import open_task
from tests.support.bases import layers, model_for, save_base
from tests.support.experts import HEADS, MakeExpert, layers_expert, raw_expert, set_config, updates_of
from tests.support.numerics import logits_of, normal

MakeModel = Callable[[], nn.Module]


def export(
    folder: Path, experts: Sequence[Expert], weights: Sequence[float], head: Head = NO_HEAD, rank: int | None = None
) -> Path:
    """Merge and write, as the command does."""
    prepared = prepare(experts, weights, open_method("interpolated"), UpdateSettings(truncation=Truncation(rank)))
    coefficients = Coefficients(
        method="interpolated",
        granularity="global",
        experts=[str(expert.path) for expert in experts],
        sha256=[expert.sha256 for expert in experts],
        experts_trained=False,
        weights={"all": list(weights)},
    )
    manifest = Manifest(
        command="merge",
        options={"weights": list(weights)},
        device="cpu",
        versions=library_versions(),
        inputs=inputs_of(list(experts)),
        outputs={},
        results={},
    )
    write_expert(
        folder,
        Layout([prepared.layout(name) for name in prepared.names], prepared.dtype, prepared.has_bias),
        (prepared.module(name) for name in prepared.names),
        head,
        base=experts[0].base,
        like=experts[0].config,
        documents=lambda summaries: Documents(manifest, coefficients, "a card"),
        force=False,
    )
    return folder


def summed_by_hand(make_model: MakeModel, folders: Sequence[Path], weights: Sequence[float]) -> nn.Module:
    """W0 + Σ w_n ΔW_n for every parameter: the slow reference; PEFT merges each expert alone."""
    model = make_model()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    total = {name: value.double() for name, value in start.items()}
    for folder, weight in zip(folders, weights, strict=True):
        alone = PeftModel.from_pretrained(make_model(), str(folder)).merge_and_unload().state_dict()
        for name in total:
            total[name] += weight * (alone[name].double() - start[name].double())
    model.load_state_dict({name: value.to(start[name].dtype) for name, value in total.items()})
    return model.eval()


def set_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Replace some parameters."""
    model.load_state_dict({**model.state_dict(), **tensors})
    return model


def batch_for(base: Path) -> dict[str, Tensor]:
    """A batch of two."""
    if base.name == "vit":
        return {"pixel_values": normal(2, 3, 16, 16)}
    tokens = torch.tensor([[4, 5, 6, 7, 8], [9, 10, 11, 0, 0]])
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long()}


def loaded(make_model: MakeModel, folder: Path) -> nn.Module:
    """As PEFT loads it, with no warning about missing keys."""
    model = PeftModel.from_pretrained(make_model(), str(folder))
    saved = load_file(folder / "adapter_model.safetensors")
    adapted = {n for n, _ in model.named_parameters() if "lora_" in n or "modules_to_save" in n}
    assert len(adapted) == len(saved)
    return model.eval()  # type: ignore[no-any-return]


@pytest.fixture(params=["vit", "bert", "gpt2"])
def base(request: pytest.FixtureRequest) -> Path:
    """Each base."""
    return request.getfixturevalue(f"{request.param}_base")  # type: ignore[no-any-return]


ONE = {"vit": "layers.0.attention.q_proj", "bert": "layer.0.attention.self.query", "gpt2": "h.0.attn.c_attn"}
OTHERS = {"vit": ["fc1", "q_proj"], "bert": ["key", "query"], "gpt2": ["mlp.c_fc", "c_attn"]}


def test_the_export_gives_the_logits_of_the_dense_sum(base: Path, tmp_path: Path, make_expert: MakeExpert) -> None:
    settings: list[dict[str, Any]] = [
        {"rank_pattern": {ONE[base.name]: 1}, "alpha_pattern": {ONE[base.name]: 3}},
        {"r": 3, "use_rslora": True, "init_seed": 5, "target_modules": OTHERS[base.name]},
        {"r": 2, "lora_alpha": 1, "lora_bias": True, "init_seed": 6},
    ]
    folders = [make_expert(tmp_path / str(i), base, seed=i, **config) for i, config in enumerate(settings)]
    weights = [0.5, 0.3, -0.4]
    experts = [open_expert(folder) for folder in folders]
    written = export(tmp_path / "out", experts, weights, choose_head("target", experts, experts[1]))

    def make_model() -> nn.Module:
        return model_for(base)

    head = {
        name.removeprefix("base_model.model."): value
        for name, value in load_file(folders[1] / "adapter_model.safetensors").items()
        if "lora_" not in name
    }
    expected = set_parameters(summed_by_hand(make_model, folders, weights), head)
    batch = batch_for(base)
    found = logits_of(loaded(make_model, written), batch)
    torch.testing.assert_close(found, logits_of(expected, batch), rtol=0, atol=1e-5)
    assert (found - logits_of(make_model(), batch)).abs().max() > 1e-2
    config = json.loads((written / "adapter_config.json").read_text())
    assert len(set(config["rank_pattern"].values())) > 1
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert (config["use_rslora"], config["r"]) == (False, config["lora_alpha"])


def test_the_export_is_read_back_as_the_same_updates(base: Path, tmp_path: Path, make_expert: MakeExpert) -> None:
    folders = [make_expert(tmp_path / str(i), base, seed=i, init_seed=i, r=2 + i) for i in range(2)]
    experts = [open_expert(folder) for folder in folders]
    again = open_expert(export(tmp_path / "out", experts, [0.5, 0.5]))
    assert again.ranks == (5,)
    once_more = open_expert(export(tmp_path / "out2", [again], [1.0]))
    assert once_more.sha256 == again.sha256
    for name in again.modules:
        deltas = [e.modules[name].scaling * e.factors(name).B @ e.factors(name).A for e in (*experts, again)]
        torch.testing.assert_close(deltas[2], (deltas[0] + deltas[1]) / 2, rtol=0, atol=1e-6)


def test_coefficients_without_scales_are_those_of_whole_experts() -> None:
    older = {
        "method": "learned",
        "granularity": "global",
        "experts": ["a", "b"],
        "sha256": ["0", "1"],
        "experts_trained": False,
        "weights": {"q": [0.5, 0.5]},
    }
    assert Coefficients.model_validate(older).scales == [1.0, 1.0]
    assert Coefficients.model_validate(older | {"scales": [0.5, 1]}).scales == [0.5, 1.0]
    with pytest.raises(ValueError, match="1 scales for 2 experts"):
        Coefficients.model_validate(older | {"scales": [0.5]})


@pytest.mark.parametrize("rank", [None, 1])
def test_conv_embedding_and_names_that_end_others_survive(rank: int | None, tmp_path: Path) -> None:
    configs: list[dict[str, Any]] = [
        {"target_modules": ["words", "conv", "proj"], "rank_pattern": {"inner.proj": 1}},
        {"target_modules": ["words", "conv", "proj"], "r": 3, "rank_pattern": {"^proj": 1}, "use_rslora": True},
    ]
    folders = [layers_expert(tmp_path / str(i), i + 1, **config) for i, config in enumerate(configs)]
    weights = [0.6, -0.5]
    written = export(tmp_path / "out", [open_expert(folder) for folder in folders], weights, rank=rank)
    expected = summed_by_hand(layers, folders, weights).state_dict()
    if rank is not None:
        start = layers().state_dict()
        for name in ("words", "proj", "inner.proj", "conv"):
            key = f"{name}.weight"
            delta = (expected[key] - start[key]).double()
            left, singular, right = torch.linalg.svd(delta.flatten(1), full_matrices=False)
            best = left[:, :rank] * singular[:rank] @ right[:rank]
            expected[key] = start[key] + best.reshape(delta.shape).float()
    reference = layers()
    reference.load_state_dict(expected)
    x = torch.tensor([[0, 1, 2, 3], [6, 5, 4, 3]])
    torch.testing.assert_close(loaded(layers, written)(x), reference(x), rtol=0, atol=1e-5)


def test_a_name_that_ends_another_has_its_own_rank(tmp_path: Path) -> None:
    shapes = {"proj": (6, 1, 6), "inner.proj": (6, 3, 6), "inner.other": (6, 2, 6)}
    expert = open_expert(raw_expert(tmp_path / "e", updates_of(shapes)))
    written = export(tmp_path / "out", [expert], [0.5])
    ranks = {name: module.rank for name, module in open_expert(written).modules.items()}
    assert ranks == {"proj": 1, "inner.proj": 3, "inner.other": 2}
    model = loaded(layers, written)
    start, x = layers(), torch.tensor([[0, 1, 2, 3]])
    for name, (A, B) in updates_of(shapes).items():
        start.get_submodule(name).weight.data += 0.5 * B @ A
    torch.testing.assert_close(model(x), start(x), rtol=1e-5, atol=1e-4)


def test_a_module_whose_name_another_ends_with_is_changed_alone(tmp_path: Path) -> None:
    updates = updates_of({"proj": (6, 2, 6)})
    written = export(tmp_path / "out", [open_expert(raw_expert(tmp_path / "e", updates))], [0.5])
    A, B = updates["proj"]
    expected, x = layers(), torch.tensor([[0, 1, 2, 3]])
    expected.proj.weight.data += 0.5 * B @ A
    found = PeftModel.from_pretrained(layers(), str(written)).eval()(x)
    torch.testing.assert_close(found, expected(x), rtol=0, atol=1e-5)


def test_a_module_without_a_bias_gets_zeros_beside_one_with(tmp_path: Path) -> None:
    folders = [
        layers_expert(tmp_path / "0", 1, target_modules=["inner.proj"]),
        layers_expert(tmp_path / "1", 2, target_modules=["other", "conv"], lora_bias=True),
    ]
    written = export(tmp_path / "out", [open_expert(folder) for folder in folders], [0.5, 2.0])
    expected, x = summed_by_hand(layers, folders, [0.5, 2.0]), torch.tensor([[0, 1, 2, 3]])
    torch.testing.assert_close(loaded(layers, written)(x), expected(x), rtol=0, atol=1e-5)


def test_a_bias_beside_an_embedding_is_refused_since_peft_loads_no_such_expert(tmp_path: Path) -> None:
    folders = [
        layers_expert(tmp_path / "0", 1, target_modules=["words"]),
        layers_expert(tmp_path / "1", 2, target_modules=["other"], lora_bias=True),
    ]
    with pytest.raises(PimergeError, match=r"has biases .*'words' is an embedding"):
        export(tmp_path / "out", [open_expert(folder) for folder in folders], [0.5, 0.5])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def pair(tmp_path: Path, vit_base: Path, parity_task: Path, make_expert: MakeExpert) -> list[Expert]:
    """Two experts of one task."""
    return [open_expert(make_expert(tmp_path / f"e{i}", vit_base, parity_task, seed=i)) for i in range(2)]


def saved_head(expert: Expert) -> dict[str, Tensor]:
    """Parameter name → tensor, as PEFT saved it."""
    saved = load_file(expert.path / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): value for key, value in saved.items() if "lora_" not in key}


def test_the_heads_policies(pair: list[Expert], tmp_path: Path, vit_base: Path) -> None:
    heads = [saved_head(expert) for expert in pair]
    expected: dict[str, dict[str, Tensor]] = {
        "target": heads[1],
        "average": {name: (heads[0][name] + heads[1][name]) / 2 for name in heads[0]},
        "none": {},
    }
    for policy, tensors in expected.items():
        written = open_expert(export(tmp_path / policy, pair, [0.5, 0.5], choose_head(policy, pair, pair[1])))
        found = saved_head(written)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
        assert written.config["modules_to_save"] == (HEADS["vit"] if tensors else None)
        assert (written.path / "task.json").is_file() == bool(tensors)
        loaded(lambda: model_for(vit_base), written.path)


def test_heads_are_averaged_only_if_the_labels_agree(pair: list[Expert]) -> None:
    path = pair[1].path / "task.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"labels": document["labels"][::-1]}))
    with pytest.raises(
        PimergeError, match=r"'e1' has the labels \['odd', 'even'\], the head of 'e0' has \['even', 'odd'\]"
    ):
        choose_head("average", pair, None)
    path.unlink()
    with pytest.raises(PimergeError, match=r"'e1' has no task\.json"):
        choose_head("average", pair, None)
    assert choose_head("target", pair, pair[1]).task is None


def test_heads_of_other_shapes_are_not_averaged(pair: list[Expert], tmp_path: Path, make_expert: MakeExpert) -> None:
    other = make_expert(tmp_path / "other", Path(str(pair[0].base.folder)), labels=3)
    shutil.copy(pair[0].path / "task.json", other)
    with pytest.raises(PimergeError, match="the head of 'other' has other tensors"):
        choose_head("average", [pair[0], open_expert(other)], None)


def test_an_unknown_target_or_policy_is_an_error(pair: list[Expert]) -> None:
    with pytest.raises(PimergeError, match=r"the target is unknown\n.*--target"):
        choose_head("target", pair, None)
    with pytest.raises(PimergeError, match=r"--head is 'mean'\n.*target, average, none"):
        choose_head("mean", pair, None)


def test_experts_without_heads_need_no_policy(tmp_path: Path) -> None:
    expert = open_expert(raw_expert(tmp_path / "e", updates_of({"q": (3, 2, 4)})))
    for policy in ("target", "average", "none"):
        assert choose_head(policy, [expert], None) == NO_HEAD


def test_the_manifest_hashes_what_lies_beside_it(pair: list[Expert], tmp_path: Path) -> None:
    written = export(tmp_path / "out", pair, [0.5, 0.5], choose_head("average", pair, None))
    manifest = json.loads((written / "pimerge.json").read_text())
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in written.iterdir()}
    del hashes["pimerge.json"]
    assert manifest["outputs"] == hashes
    files = {"adapter_config.json", "adapter_model.safetensors", "coefficients.json", "task.json", "README.md"}
    assert set(hashes) == files
    weights = [hashlib.sha256((expert.path / "adapter_model.safetensors").read_bytes()).hexdigest() for expert in pair]
    assert manifest["inputs"] == [{"name": f"e{i}", "sha256": weights[i]} for i in range(2)]
    assert manifest["versions"]["torch"] == torch.__version__


def test_the_same_inputs_give_the_same_bytes(pair: list[Expert], tmp_path: Path) -> None:
    first, second = (
        export(tmp_path / name, pair, [0.5, 0.3], choose_head("average", pair, None)) for name in ("out1", "out2")
    )
    files = sorted(file.name for file in first.iterdir())
    assert files == sorted(file.name for file in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


@pytest.mark.parametrize("where", ["out", "deep/er/out"])
def test_the_task_means_the_same_from_the_new_folder(where: str, pair: list[Expert], tmp_path: Path) -> None:
    written = export(tmp_path / where, pair, [0.5, 0.5], choose_head("target", pair, pair[0]))
    task, own = task_of(open_expert(written)), open_task(pair[0].path)
    assert task is not None
    assert isinstance(task.file.data, dict)
    assert isinstance(own.file.data, dict)
    for split, name in own.file.data.items():
        assert (written / str(task.file.data[split])).resolve() == (pair[0].path / str(name)).resolve()
        assert not Path(str(task.file.data[split])).is_absolute()
    assert (task.labels, task.sha256()) == (own.labels, own.sha256())


@pytest.mark.parametrize("where", ["pool/out", "out", "elsewhere/deep/out", "pool/e/out"])
@pytest.mark.parametrize("name", ["base", "../base", "absolute", "option"])
def test_the_base_is_found_from_the_output_wherever_it_is(
    name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "pool" / "base", normal(2, 2))
    save_base(tmp_path / "elsewhere" / "base", normal(2, 2, seed=1))  # another base of the same name
    folder = raw_expert(tmp_path / "pool" / "e", updates_of({"q": (3, 2, 4)}))
    set_config(folder, base_model_name_or_path=str(base) if name == "absolute" else name)
    monkeypatch.chdir(tmp_path / "pool")
    expert = open_expert(folder, "base" if name == "option" else None)
    written = export(tmp_path / where, [expert], [1.0])
    monkeypatch.chdir("/")
    found = open_expert(written).base
    assert found.folder is not None
    assert found.folder.resolve() == base
    assert found.identity == expert.base.identity


def test_a_hub_base_keeps_its_name_and_revision(tmp_path: Path) -> None:
    folder = set_config(raw_expert(tmp_path / "e", updates_of({"q": (3, 2, 4)})), revision="v1")
    config = json.loads((export(tmp_path / "out", [open_expert(folder)], [1.0]) / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v1")


def test_an_output_that_is_there_stays(pair: list[Expert], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(PimergeError, match="--force"):
        export(tmp_path / "out", pair, [0.5, 0.5])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
