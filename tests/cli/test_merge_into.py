"""The command ``pimerge merge --into``, against PEFT's model of base and adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from pimerge.adapters.expert import Expert, open_expert
from pimerge.adapters.ranking_document import Candidate, Ranking, Target
from tests.support.bases import model_for
from tests.support.cli import Cli, Shell
from tests.support.experts import dense_deltas, raw_expert, set_config, updates_of
from tests.support.numerics import logits_of, normal

TWO = ("experts/a", "experts/b")
BATCH = {"pixel_values": normal(2, 3, 16, 16)}


def tensors(folder: Path | str) -> dict[str, Tensor]:
    """Every tensor of a folder."""
    return {key: value for file in sorted(Path(folder).glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_folded(base: Path, output: str, pair: dict[str, Expert], shares: tuple[float, float]) -> None:
    """For each module one weight is W0 + Σ w ΔW; every other tensor is the base's to the bit."""
    before, after = tensors(base), tensors(output)
    assert before.keys() == after.keys()
    changes = [after[key].double() - before[key].double() for key in before if not torch.equal(before[key], after[key])]
    a, b = dense_deltas(pair["a"]), dense_deltas(pair["b"])
    assert len(changes) == len(a)
    for name in a:
        wanted = shares[0] * a[name] + shares[1] * b[name]
        assert sum(torch.allclose(change, wanted, rtol=0, atol=1e-6) for change in changes) == 1


@pytest.mark.parametrize("sharded", [False, True])
def test_the_folded_model_answers_as_the_merged_adapter(
    sharded: bool, cli: Cli, pair: dict[str, Expert], vit_base: Path
) -> None:
    base = vit_base
    given: list[object] = []
    if sharded:
        base = Path("base")
        transformers.ViTModel.from_pretrained(vit_base, add_pooling_layer=False).save_pretrained(
            base, max_shard_size="8KB"
        )
        assert len(list(base.glob("*.safetensors"))) > 2
        given = ["--base", base]
    merged = cli("merge", *TWO, "--target", "experts/a", "-o", "adapter")
    assert merged.exit_code == 0, merged.exception
    result = cli("merge", *TWO, "--target", "experts/a", "--into", base, *given, "-o", "full")
    assert result.exit_code == 0, result.exception
    assert "the head is written as classifier.bias, classifier.weight" in result.stderr
    model = transformers.AutoModelForImageClassification.from_pretrained("full").eval()
    wanted = logits_of(PeftModel.from_pretrained(model_for(vit_base), "adapter").eval(), BATCH)
    torch.testing.assert_close(logits_of(model, BATCH), wanted, rtol=0, atol=1e-5)
    assert model.config.id2label == {0: "even", 1: "odd"}
    names = {file.name for file in Path("full").iterdir()}
    assert {"config.json", "pimerge.json", "coefficients.json", "README.md"} <= names
    assert ("model.safetensors.index.json" in names) == sharded
    options = json.loads(Path("full/pimerge.json").read_text())["options"]
    assert options["into"] == base.name


def test_experts_of_the_ranking_are_folded_at_its_scales(cli: Cli, pair: dict[str, Expert], vit_base: Path) -> None:
    a, b = ({"name": name, "path": f"experts/{name}", "sha256": pair[name].sha256} for name in "ab")
    ranking = Ranking(
        target=Target(**a),
        measure="fisher",
        k=1,
        selected=["b"],
        why="by hand",
        candidates=[Candidate(**b, score=1.0, low=0.0, high=2.0, scale=0.5)],
        not_comparable=[],
    )
    ranking.save(Path("ranking.json"), force=False)
    result = cli("merge", "--head", "none", "--into", vit_base, "-o", "full")
    assert result.exit_code == 0, result.exception
    assert "'b' × 0.5" in result.stderr
    assert_folded(vit_base, "full", pair, (0.0, 0.5))
    assert json.loads(Path("full/coefficients.json").read_text())["scales"] == [0.5]


def test_without_a_head_only_adapted_weights_change(cli: Cli, pair: dict[str, Expert], vit_base: Path) -> None:
    given = ["--method", "interpolated", "--weights", "0.7,-0.2", "--head", "none", "-o", "full", "--json"]
    result = cli("merge", *TWO, "--into", vit_base, *given)
    assert result.exit_code == 0, result.exception
    document = json.loads(result.stdout)
    assert (document["folded"], document["truncation"]) == (4, 0.0)
    assert_folded(vit_base, "full", pair, (0.7, -0.2))
    assert (Path("full/config.json")).read_bytes() == (vit_base / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_is_that_of_every_float(dtype: str, cli: Cli, pair: dict[str, Expert], vit_base: Path) -> None:
    given = ["--head", "none", "--dtype", dtype, "-o", "full"]
    assert cli("merge", *TWO, "--into", vit_base, *given).exit_code == 0
    assert {str(tensor.dtype) for tensor in tensors("full").values()} == {f"torch.{dtype}"}


def test_a_single_file_of_a_diffusion_model(cli: Cli) -> None:
    shapes = {"unet.down.0.to_q": (6, 2, 8), "unet.mid.to_out.0": (8, 2, 6)}
    experts = [open_expert(raw_expert(Path(name), updates_of(shapes, seed))) for seed, name in enumerate("ab")]
    prefix = "model.diffusion_model."
    stored = {
        f"{prefix}{name.removeprefix('unet.')}.weight": normal(d_out, d_in, seed=9).half()
        for name, (d_out, _, d_in) in shapes.items()
    } | {f"{prefix}out.bias": normal(3).half()}
    save_file(stored, "model.safetensors", {"format": "pt"})
    result = cli("merge", "a", "b", "--into", "model.safetensors", "-o", "full")
    assert result.exit_code == 0, result.exception
    found = load_file("full/model.safetensors")
    assert found.keys() == stored.keys()
    assert torch.equal(found[f"{prefix}out.bias"], stored[f"{prefix}out.bias"])
    a, b = map(dense_deltas, experts)
    for name in shapes:
        key = f"{prefix}{name.removeprefix('unet.')}.weight"
        wanted = stored[key].double() + (a[name] + b[name]) / 2
        torch.testing.assert_close(found[key].double(), wanted, rtol=2e-3, atol=1e-3)
    assert 'load_file("path/to/this/folder/model.safetensors")' in Path("full/README.md").read_text()


def test_a_dry_run_writes_nothing(cli: Cli, pair: dict[str, Expert], vit_base: Path) -> None:
    before = sorted(Path().rglob("*"))
    result = cli("merge", *TWO, "--target", "experts/a", "--into", vit_base, "--dry-run")
    assert result.exit_code == 0, result.exception
    assert "the head is written as classifier.bias, classifier.weight" in result.stdout
    assert "nothing is written now" in result.stdout
    document = json.loads(cli("merge", *TWO, "--head", "none", "--into", vit_base, "--dry-run", "--json").stdout)
    assert document["size"] == sum(tensor.numel() * tensor.itemsize for tensor in tensors(vit_base).values())
    assert sorted(Path().rglob("*")) == before


def test_another_model_is_refused(shell: Shell, pair: dict[str, Expert], vit_base: Path, bert_base: Path) -> None:
    shutil.copytree(vit_base, "moved")
    changed = {key: tensor + 1 for key, tensor in tensors(vit_base).items()}
    save_file(changed, "moved/model.safetensors", {"format": "pt"})
    result = shell("merge", *TWO, "--head", "none", "--into", "moved", "-o", "full")
    assert (result.code, Path("full").exists()) == (3, False)
    assert "'moved' differs from the base of the experts" in result.err
    assert shell("merge", *TWO, "--head", "none", "--into", "moved", "--base", "moved", "-o", "full").code == 0
    result = shell("merge", *TWO, "--head", "none", "--into", bert_base, "--base", bert_base, "-o", "other")
    assert (result.code, Path("other").exists()) == (3, False)
    assert "vit.layers.0.attention.q_proj" in result.err


def test_a_quantised_checkpoint_is_refused(shell: Shell, pair: dict[str, Expert], vit_base: Path) -> None:
    shutil.copytree(vit_base, "base")
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    result = shell("merge", *TWO, "--head", "none", "--into", "base", "--base", "base", "-o", "full")
    assert (result.code, Path("full").exists()) == (3, False)
    assert "the checkpoint 'base' is quantised: quantization_config in config.json" in result.err


@pytest.mark.parametrize("output", ["base", "folder"])
def test_the_checkpoint_is_never_replaced(output: str, shell: Shell, pair: dict[str, Expert], vit_base: Path) -> None:
    base = Path(shutil.copytree(vit_base, "folder/base"))
    before = (base / "model.safetensors").read_bytes()
    target = base if output == "base" else base.parent
    given = ["--head", "none", "--into", base, "--base", base]
    result = shell("merge", *TWO, *given, "-o", target, "--force")
    assert result.code == 3
    assert f"'{target}'" in result.err
    assert (base / "model.safetensors").read_bytes() == before
    gone = shell("merge", *TWO, "--head", "none", "--into", "org/gone", "-o", "full")
    assert gone.code == 3
    assert "'org/gone'" in gone.err


def test_tied_weights_are_written_apart(cli: Cli, gpt2_base: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(gpt2_base)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained("base")
    model = get_peft_model(
        transformers.GPT2LMHeadModel.from_pretrained("base"),
        LoraConfig(target_modules=["wte", "c_attn"], fan_in_fan_out=True),
    )
    with torch.no_grad():
        for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(normal(*parameter.shape, seed=seed, scale=0.2))
    model.save_pretrained("e", save_embedding_layers=False)
    set_config(Path("e"), base_model_name_or_path=str(Path("base").resolve()))
    result = cli("merge", "e", "--into", "base", "-o", "full")
    assert result.exit_code == 0, result.exception
    assert "tied weights: both are written, and config.json no longer ties them" in result.stderr
    batch = {"input_ids": torch.arange(10).view(2, 5)}
    found = transformers.GPT2LMHeadModel.from_pretrained("full").eval()
    wanted = PeftModel.from_pretrained(transformers.GPT2LMHeadModel.from_pretrained("base"), "e").eval()
    torch.testing.assert_close(logits_of(found, batch), logits_of(wanted, batch), rtol=0, atol=1e-4)
