"""LoRA's relatives as PEFT writes them: the ΔW of every module is PEFT's own, and whatever serves LoRA serves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    FourierFTConfig,
    LoHaConfig,
    LoKrConfig,
    PeftConfig,
    PeftModel,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pimerge.adapters.expert import open_expert
from pimerge.adapters.expert_files import WEIGHTS
from pimerge.adapters.kind import KINDS
from pimerge.core.errors import PimergeError
from pimerge.embedding.store import Store
from pimerge.embedding.strengths import STRENGTHS, models_at_strengths
from pimerge.models.heads import set_head
from pimerge.models.injection import injected, injected_sum
from pimerge.tasks.task import open_task
from tests.support.bases import inputs, loaded_base, model_for
from tests.support.experts import OF_THE_BASE, RELATIVES, MakeExpert, dense_deltas, edit_tensors, set_config
from tests.support.numerics import logits_of, relative_difference

Run = Callable[..., Any]
READ = tuple(kind for kind in RELATIVES if kind not in OF_THE_BASE)
"""Those whose ΔW does not need the base's weights."""
TELL_SHAPES = ("unilora", "loha", "lokr")
TUNED = tuple(kind for kind in READ if KINDS.load(kind).fresh_fields is not None)
TRANSFORMERS = {"bert": ["query", "intermediate.dense", "output.dense"], "gpt2": ["c_attn", "c_proj"]}
LINEAR: list[tuple[str, PeftConfig]] = [
    ("bert", LoHaConfig(r=2, alpha=3, rank_pattern={"query": 3}, alpha_pattern={"intermediate.dense": 5})),
    ("bert", LoHaConfig(r=6)),  # r² exceeds the rank of a 16 × 16 matrix
    ("bert", LoKrConfig(r=2, alpha=3)),
    ("bert", LoKrConfig(r=1, decompose_both=True, rank_pattern={"query": 64}, alpha_pattern={"output.dense": 2})),
    ("bert", LoKrConfig(r=1, decompose_both=True, decompose_factor=2)),
    ("bert", LoKrConfig(r=64, init_weights="lycoris")),
    *((base, VeraConfig(r=r, save_projection=saved, projection_prng_key=7))
      for base in TRANSFORMERS for r, saved in ((4, True), (4, False), (64, False))),
    *((base, RandLoraConfig(r=r, save_projection=saved, projection_prng_key=7, **sparse))
      for base in TRANSFORMERS
      for r, saved, sparse in (
          (3, True, {}), (5, False, {}), (3, False, {"sparse": True}), (8, True, {"very_sparse": True})
      )),
    *((base, FourierFTConfig(n_frequency=n, random_loc_seed=seed, scaling=scaling, n_frequency_pattern=pattern))
      for base in TRANSFORMERS for n, seed, scaling, pattern in ((4, 777, 150.0, {"query": 2}), (40, 5, 20.0, {}))),
]  # fmt: skip


class Convolutions(nn.Module):
    """Layers of two and of one dimension, with and without a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Conv2d(8, 12, (3, 2))
        self.point = nn.Conv2d(8, 12, 1)
        self.long = nn.Conv1d(8, 12, 3)
        self.dense = nn.Linear(6, 8)


def trained(model: nn.Module, config: PeftConfig, folder: Path, base: Path) -> Path:
    """An expert as PEFT starts it, every trainable number moved as training would."""
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return set_config(folder, base_model_name_or_path=str(base))


def merged_by_peft(model: nn.Module, folder: Path, names: list[str]) -> dict[str, Tensor]:
    """Module → what PEFT adds to its weight, from the file, (d_out × d_in)."""
    layers = dict(model.named_modules())
    for name in names:  # so that no weight rounds the update
        layers[name].weight.detach().zero_()
    merged = dict(PeftModel.from_pretrained(model, folder).merge_and_unload().named_modules())
    found = {}
    for name in names:
        delta = merged[name].weight.detach().double().flatten(1)
        found[name] = delta.T if type(merged[name]).__name__ == "Conv1D" else delta
    return found


def assert_as_peft(folder: Path, model: nn.Module, tolerance: float = 2e-6) -> None:
    expert = open_expert(folder)
    expected = merged_by_peft(model, folder, list(expert.modules))
    for name, delta in dense_deltas(expert).items():
        module, factors = expert.modules[name], expert.factors(name)
        assert (len(factors.A), factors.A.shape[1], len(factors.B)) == (module.rank, module.d_in, module.d_out)
        assert relative_difference(delta, expected[name]) < tolerance, name


@pytest.mark.parametrize(("base", "config"), LINEAR, ids=lambda value: getattr(value, "peft_type", value))
def test_the_update_of_every_module_is_pefts(
    base: str, config: PeftConfig, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    where = request.getfixturevalue(f"{base}_base")
    config.target_modules = set(TRANSFORMERS[base])
    folder = trained(model_for(where), config, tmp_path / "x", where)
    assert_as_peft(folder, model_for(where))


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
@pytest.mark.parametrize("r", [1, 3])
def test_convolutions_have_the_shape_that_the_base_says(
    kind: type[PeftConfig], effective: bool, r: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Convolutions()
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file(model.state_dict(), base / "model.safetensors")
    layers = ["flat", "point", "long", "dense"]
    if effective and kind is LoKrConfig and r == 1:  # PEFT fails there
        layers.remove("long")
    config = kind(r=r, alpha=2, target_modules=layers, use_effective_conv2d=effective)
    folder = trained(model, config, tmp_path / "x", base)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert_as_peft(folder, Convolutions())
    assert open_expert(folder).modules["flat"].layer == "conv"
    set_config(folder, base_model_name_or_path="org/elsewhere")
    if effective:
        with pytest.raises(PimergeError, match=r"'flat': it adapts a convolution[\s\S]*--base"):
            open_expert(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", READ)
def test_numbers_of_sixteen_bits_are_read_as_they_are(
    make_expert: MakeExpert, bert_base: Path, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = make_expert(tmp_path / "x", bert_base, kind=kind, head=False)
    edit_tensors(folder, lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}))
    assert open_expert(folder).dtypes == ({torch.bfloat16: "BF16", torch.float16: "F16"}[dtype],)
    assert_as_peft(folder, model_for(bert_base))


@pytest.mark.parametrize("kind", READ)
def test_plugged_in_at_any_strength_it_answers_as_in_peft(
    make_expert: MakeExpert, bert_base: Path, kind: str, tmp_path: Path
) -> None:
    folder = make_expert(tmp_path / "x", bert_base, kind=kind, head=False)
    expert, loaded, batch = open_expert(folder), loaded_base(bert_base), inputs("bert")
    before = logits_of(loaded.model, batch)
    full = logits_of(PeftModel.from_pretrained(model_for(bert_base), folder).eval(), batch)
    with injected(expert, loaded) as model:
        assert torch.equal(logits_of(model, batch), full)
    for scale, model in models_at_strengths(expert, loaded):
        reference = model_for(bert_base)
        for name, delta in dense_deltas(expert).items():
            reference.get_submodule(name).weight.data += scale * delta.float()
        torch.testing.assert_close(logits_of(model, batch), logits_of(reference, batch))
        if scale == max(STRENGTHS):
            torch.testing.assert_close(logits_of(model, batch), full)
    with injected_sum([expert.with_strength(0.0)], [1.0], loaded) as model:
        torch.testing.assert_close(logits_of(model, batch), before)
    assert torch.equal(logits_of(loaded.model, batch), before)


def pool_of(make_expert: MakeExpert, base: Path, task: Path, folder: Path) -> list[Path]:
    kinds = ("lora", *READ)
    return [make_expert(folder / kind, base, task, kind=kind, seed=seed) for seed, kind in enumerate(kinds)]


def mean_by_hand(base: Path, folders: list[Path]) -> nn.Module:
    """The base with the mean of the dense updates, and the first one's head."""
    model = model_for(base)
    for folder in folders:
        for name, delta in dense_deltas(open_expert(folder)).items():
            model.get_submodule(name).weight.data += delta.float() / len(folders)
    set_head(model, open_expert(folders[0]).head_tensors())
    return model


def test_all_kinds_with_an_update_are_summed(
    make_expert: MakeExpert, bert_base: Path, text_task: Path, cli: Run, tmp_path: Path
) -> None:
    folders, batch = pool_of(make_expert, bert_base, text_task, tmp_path), inputs("bert")
    expected = logits_of(mean_by_hand(bert_base, folders), batch)
    result = cli("merge", *folders, "--target", folders[0], "--output", "out", "--verify", "--json")
    assert result.exit_code == 0, result.exception
    found = PeftModel.from_pretrained(model_for(bert_base), tmp_path / "out").eval()
    torch.testing.assert_close(logits_of(found, batch), expected)
    loaded = loaded_base(bert_base)
    with injected_sum([open_expert(folder) for folder in folders], [1 / len(folders)] * len(folders), loaded) as model:
        set_head(model, open_expert(folders[0]).head_tensors())
        torch.testing.assert_close(logits_of(model, batch), expected)
    other = make_expert(tmp_path / "ia3", bert_base, text_task, kind="ia3")
    for pair in ([folders[1], other], [other, folders[1]]):
        refused = cli("merge", *pair, "--output", "no")
        assert isinstance(refused.exception, PimergeError)
        assert "of kind ia3" in str(refused.exception)
        assert "depends on the base's weights" in str(refused.exception)
    assert not Path("no").exists()


def test_truncation_reports_its_error_of_every_module(
    make_expert: MakeExpert, bert_base: Path, text_task: Path, cli: Run, tmp_path: Path
) -> None:
    folder = make_expert(tmp_path / "x", bert_base, text_task, kind="randlora")
    document = json.loads(cli("merge", folder, "--target", folder, "--rank", "3", "-o", "out", "--json").stdout)
    whole, cut = dense_deltas(open_expert(folder)), dense_deltas(open_expert("out"))
    for name, said in document["modules"].items():
        assert said["rank"] == 3
        assert said["truncation"] == pytest.approx(relative_difference(cut[name], whole[name]), rel=1e-4)
        best = torch.linalg.svdvals(whole[name])
        assert said["truncation"] == pytest.approx(float(best[3:].norm() / best.norm()), rel=1e-6)


@pytest.mark.parametrize("options", [["--method", "fisher"], ["--method", "ties", "--space", "factors"]])
def test_entries_of_factors_that_nobody_trained_are_not_merged(
    make_expert: MakeExpert, bert_base: Path, text_task: Path, cli: Run, tmp_path: Path, options: list[str]
) -> None:
    folders = [make_expert(tmp_path / f"x{n}", bert_base, text_task, kind="loha", seed=n) for n in range(2)]
    if "fisher" in options:
        assert cli("embed", *folders).exit_code == 0
    result = cli("merge", *folders, *options)
    assert isinstance(result.exception, PimergeError)
    assert "'x0' is of kind loha: its factors are computed" in str(result.exception)


@pytest.mark.parametrize("kind", READ)
def test_the_fisher_is_that_of_the_stored_tensors(
    make_expert: MakeExpert, bert_base: Path, text_task: Path, cli: Run, kind: str, tmp_path: Path
) -> None:
    folder = make_expert(tmp_path / "x", bert_base, text_task, kind=kind)
    assert cli("embed", folder, "--examples", "4").exit_code == 0
    found = Store(tmp_path / "embeddings.json").diagonal("x")
    model = PeftModel.from_pretrained(model_for(bert_base), folder).eval()
    expert = open_expert(folder)
    named = ((expert.strategy.key_of_parameter(name), parameter) for name, parameter in model.named_parameters())
    parameters = {key: parameter for key, parameter in named if key in expert.keys}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    task = open_task(text_task)
    examples, _ = task.examples("train", task.type.load_processor(str(bert_base), None), model.config, limit=4)
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for index in range(4):
        model.zero_grad()
        task.type.nll(model, examples.batch([index])).sum().backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            expected[name] += parameter.grad.square() / 4
    assert found.keys() == expected.keys() == set(expert.keys)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-10)


def test_the_pool_is_ranked_across_kinds(
    make_expert: MakeExpert, bert_base: Path, text_task: Path, cli: Run, tmp_path: Path
) -> None:
    folders = pool_of(make_expert, bert_base, text_task, tmp_path / "experts")
    assert cli("embed", "--examples", "4").exit_code == 0

    def ranked(*arguments: str) -> dict[str, Any]:
        result = cli("rank", "--target", "loha", "--no-gate", "--force", *arguments)
        assert result.exit_code == 0, result.exception
        document: dict[str, Any] = json.loads(Path("ranking.json").read_text())
        return document

    dense = [torch.cat([delta.ravel() for delta in dense_deltas(open_expert(folder)).values()]) for folder in folders]
    names = [folder.name for folder in folders]
    centred = torch.stack(dense) - torch.stack(dense).mean(0)
    target = centred[names.index("loha")]
    cosines = dict(zip(names, torch.nn.functional.cosine_similarity(centred, target[None]).tolist(), strict=True))
    scores = {each["name"]: each["score"] for each in ranked("--measure", "delta")["candidates"]}
    assert scores == {name: pytest.approx(cosines[name]) for name in names if name != "loha"}
    for measure in ("fisher", "marginals", "label-cka"):
        document = ranked("--measure", measure, "-k", "5")
        assert len(document["candidates"]) == len(folders) - 1
        assert len(document["selected"]) == 5  # whatever their kinds, they can be summed
    assert cli("merge", "--method", "uniform").exit_code == 0
    assert "its kind is" in ranked("--measure", "parameters")["not_comparable"][0]["reason"]


@pytest.mark.parametrize(("kind", "field"), [("vera", "projection_prng_key"), ("fourierft", "random_loc_seed")])
def test_by_their_numbers_those_of_one_draw_compare(
    make_expert: MakeExpert, bert_base: Path, text_task: Path, cli: Run, kind: str, field: str, tmp_path: Path
) -> None:
    for name, seed, draw in (("a", 0, 1), ("b", 1, 1), ("c", 2, 2)):  # another draw, another meaning
        make_expert(tmp_path / "experts" / name, bert_base, text_task, kind=kind, seed=seed, **{field: draw})
    assert cli("embed", "--examples", "2").exit_code == 0
    result = cli("rank", "--target", "a", "--measure", "parameters", "--no-gate", "--json")
    document = json.loads(result.stdout)
    numbers = [load_file(tmp_path / "experts" / name / "adapter_model.safetensors") for name in "ab"]
    keys = open_expert(tmp_path / "experts" / "a").keys
    a, b = (torch.cat([file[key].ravel() for key in keys]).double() for file in numbers)
    assert [each["name"] for each in document["candidates"]] == ["b"]
    assert document["candidates"][0]["score"] == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, 0)))
    assert f"its {field} is 2" in document["not_comparable"][0]["reason"]


QUICK = ("--epochs", "1", "--batch-size", "8", "--shots", "6")


@pytest.mark.parametrize("method", ["interpolated", "uniform"])
def test_they_are_tuned_as_a_lora_of_almost_all_their_energy(
    make_expert: MakeExpert, bert_base: Path, text_task: Path, cli: Run, method: str, tmp_path: Path
) -> None:
    folders = [make_expert(tmp_path / kind, bert_base, text_task, kind=kind) for kind in ("randlora", "lora", "vera")]
    arguments = ("tune", *folders[:2], "--method", method, "--target", folders[2], *QUICK)
    for output in ("out", "again"):
        result = cli(*arguments, "-o", output)
        assert result.exit_code == 0, result.exception
    assert "'randlora' is of kind randlora: it becomes a LoRA of rank" in result.stderr
    first, again = (Path(name, "adapter_model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == again
    assert open_expert("out").kind == "lora"
    if method == "uniform":
        deltas = [dense_deltas(open_expert(folder)) for folder in folders[:2]]
        for name, delta in dense_deltas(open_expert("out")).items():
            assert 0 < relative_difference(delta, (deltas[0][name] + deltas[1][name]) / 2) < 0.12
    few = cli(*arguments, "--rank", "2", "-o", "few")
    assert "a LoRA of rank 2" in few.stderr
    assert open_expert("few").ranks == (2,)


@pytest.mark.parametrize("kind", TUNED)
def test_a_fresh_one_is_trained_as_it_is_and_loads_with_peft(
    make_expert: MakeExpert, bert_base: Path, text_task: Path, cli: Run, kind: str, tmp_path: Path
) -> None:
    target = make_expert(tmp_path / "x", bert_base, text_task)
    arguments = ("tune", "--method", "scratch", "--kind", kind, "--fresh-rank", "4", "--target", target, "--lr", "0.1")
    result = cli(*arguments, *QUICK, "-o", "out")
    assert result.exit_code == 0, result.exception
    expert = open_expert("out")
    assert expert.kind == kind
    assert all(float(delta.norm()) > 0 for delta in dense_deltas(expert).values())
    assert_as_peft(Path("out"), model_for(bert_base))
    refused = cli(*arguments, "--rank", "2", "-o", "no")
    assert isinstance(refused.exception, PimergeError)
    assert "--rank is for LoRA" in str(refused.exception)


@pytest.mark.parametrize("kind", READ)
def test_without_the_base_only_those_that_need_no_shapes_are_read(
    make_expert: MakeExpert, bert_base: Path, kind: str, tmp_path: Path
) -> None:
    folder = make_expert(tmp_path / "x", bert_base, kind=kind, head=False)
    expected = dense_deltas(open_expert(folder))
    set_config(folder, base_model_name_or_path="org/elsewhere")
    if kind in TELL_SHAPES:
        found = dense_deltas(open_expert(folder))
    else:
        with pytest.raises(PimergeError, match=r"the base 'org/elsewhere' is not on this machine[\s\S]*--base"):
            open_expert(folder)
        seen = open_expert(folder, only_look=True)
        assert (seen.kind, seen.parameters) == (
            kind,
            sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values()),
        )
        assert "not on this machine" in seen.unhandled
        found = dense_deltas(open_expert(folder, str(bert_base)))
    assert all(torch.equal(found[name], delta) for name, delta in expected.items())


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
FAULTS: list[tuple[str, dict[str, Any], dict[str, Tensor | None], str]] = [
    ("loha", {"r": 3}, {}, r"query\.hada_w1_a is \(16, 2\), expected \(16, 3\)"),
    ("loha", {"rank_pattern": {"(": 2}}, {}, "PEFT cannot create its layers for LOHA"),
    ("loha", {"alpha": "much"}, {}, "alpha in adapter_config.json"),
    ("loha", {"use_dora": True}, {}, "'use_dora' in adapter_config.json is not known to PEFT"),
    ("loha", {}, {f"{QUERY}.hada_w2_b": None}, r"it has no bert\.\S+query\.hada_w2_b"),
    (
        "loha",
        {},
        {f"{QUERY}.hada_t1": torch.ones(2, 2, 1, 1)},
        r"it has bert\.\S+query\.hada_t1, which PEFT's layers do not have",
    ),
    ("loha", {}, {f"{QUERY}.dora_scale": torch.ones(16)}, "dora_scale"),
    ("lokr", {"r": 2}, {}, r"lokr_w2_a, which PEFT's layers do not have"),
    ("lokr", {}, {f"{QUERY}.lokr_w1": None}, r"it has no bert\.\S+query\.lokr_w1,"),
    ("lokr", {}, {f"{QUERY}.lokr_w1": torch.ones(4)}, r"lokr_w1 is \(4,\), expected \(4, 4\)"),
    ("lokr", {}, {f"{QUERY}.lokr_w1": torch.ones(4, 2)}, r"lokr_w1 is \(4, 2\), expected \(4, 4\)"),
    ("vera", {"r": 4}, {}, r"vera_lambda_d is \(5,\), expected \(4,\)"),
    ("vera", {"projection_prng_key": "x"}, {}, "projection_prng_key in adapter_config.json"),
    ("vera", {}, {f"{QUERY}.vera_lambda_b": torch.ones(8)}, r"vera_lambda_b is \(8,\), expected \(16,\)"),
    (
        "vera",
        {},
        {"base_model.vera_A": torch.ones(5, 16)},
        r"it has base_model\.vera_A, which PEFT's layers do not have",
    ),
    (
        "vera",
        {"save_projection": True},
        {"base_model.vera_A": torch.ones(5, 9), "base_model.vera_B": torch.ones(16, 5)},
        r"vera_A is \(5, 9\)",
    ),
    ("randlora", {"r": 4}, {}, "randlora_lambda is .*expected"),
    (
        "fourierft",
        {},
        {f"{QUERY}.fourierft_spectrum": torch.ones(300)},
        r"fourierft_spectrum is \(300,\), expected \(6,\)",
    ),
]


@pytest.mark.parametrize(("kind", "fields", "tensors", "said"), FAULTS)
def test_what_does_not_fit_is_refused_by_name(
    make_expert: MakeExpert,
    bert_base: Path,
    tmp_path: Path,
    kind: str,
    fields: dict[str, Any],
    tensors: dict[str, Tensor | None],
    said: str,
) -> None:
    folder = set_config(make_expert(tmp_path / "x", bert_base, kind=kind, head=False), **fields)

    def edit(found: dict[str, Tensor]) -> None:
        for key, value in tensors.items():
            found.pop(key, None)
            if value is not None:
                found[key] = value

    edit_tensors(folder, edit)
    with pytest.raises(PimergeError, match=said):
        open_expert(folder)
    with pytest.raises(PimergeError, match=said):
        open_expert(folder, only_look=True)
