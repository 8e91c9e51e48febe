"""A folder of pickles becomes one that transformers loads with the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from pimerge.checkpoints.pickled_folder import Unpickled, has_pickled_weights, unpickle_folder
from pimerge.core.errors import PimergeError
from pimerge.core.progress import silent
from tests.support.bases import model_for
from tests.support.checkpoints import tensors as tensors_of
from tests.support.numerics import normal


def pickled(base: Path, folder: Path, model: nn.Module | None = None) -> nn.Module:
    """Save a base with its weights as ``pytorch_model.bin``, tied tensors sharing their memory."""
    model = model or model_for(base)
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


def unpickled(folder: Path, output: Path) -> Unpickled:
    output.mkdir()
    found = Unpickled()
    unpickle_folder(folder, output, found, silent)
    return found


def same(found: nn.Module, expected: nn.Module) -> bool:
    own, other = found.state_dict(), expected.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2-lm", "qwen2-lm"])
def test_tied_tensors_are_written_once_as_transformers_does(
    tmp_path: Path, language_base: Callable[[str], Path], name: str
) -> None:
    model = pickled(language_base(name), tmp_path / "old")
    assert has_pickled_weights(tmp_path / "old")
    found = unpickled(tmp_path / "old", tmp_path / "new")
    model.save_pretrained(tmp_path / "reference")  # type: ignore[operator]
    written, expected = tensors_of(tmp_path / "new"), tensors_of(tmp_path / "reference")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in written)
    assert found.tied
    assert found.tensors == len(written)
    assert same(type(model).from_pretrained(tmp_path / "new"), model)  # type: ignore[attr-defined]


def test_a_shared_tensor_that_the_model_does_not_tie_is_kept(
    tmp_path: Path, language_base: Callable[[str], Path]
) -> None:
    model = model_for(language_base("llama-lm"))
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]
    pickled(tmp_path, tmp_path / "old", model)
    found = unpickled(tmp_path / "old", tmp_path / "new")
    assert found.tied == []
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)  # type: ignore[union-attr]


def test_shards_and_their_index(tmp_path: Path, bert_base: Path) -> None:
    model = model_for(bert_base)
    model.config.save_pretrained(tmp_path / "old")  # type: ignore[operator, union-attr]
    state = model.state_dict()
    places = {key: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, key in enumerate(state)}
    for shard in set(places.values()):
        torch.save({key: state[key] for key in state if places[key] == shard}, tmp_path / "old" / shard)
    index = {"metadata": {"total_size": 1, "by": "x"}, "weight_map": places}
    (tmp_path / "old" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    (tmp_path / "old" / "optimizer.pt").touch()
    found = unpickled(tmp_path / "old", tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    written = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert written["metadata"] == {"total_size": found.size, "by": "x"}
    assert found.size == sum(tensor.nbytes for tensor in state.values())
    assert same(type(model).from_pretrained(tmp_path / "new"), model)  # type: ignore[attr-defined]
    first = sorted(set(places.values()))[0]
    torch.save({}, tmp_path / "old" / first)
    with pytest.raises(PimergeError, match="holds no tensors"):
        unpickled(tmp_path / "old", tmp_path / "again")
    (tmp_path / "old" / first).unlink()
    with pytest.raises(PimergeError, match=rf"names the shard '{first}', which does not exist"):
        unpickled(tmp_path / "old", tmp_path / "more")


def test_the_parts_of_a_pipeline_are_converted(tmp_path: Path) -> None:
    old, unet = tmp_path / "old", {"conv.weight": normal(2, 2)}
    for part in ("unet", "vae", "scheduler"):
        (old / part).mkdir(parents=True)
        (old / part / "config.json").write_text("{}")
    index = {"_class_name": "P", "unet": ["d", "U"], "vae": ["d", "V"], "scheduler": ["d", "S"], "gone": [None, None]}
    (old / "model_index.json").write_text(json.dumps(index))
    torch.save(unet, old / "unet" / "diffusion_pytorch_model.bin")
    torch.save(unet, old / "vae" / "diffusion_pytorch_model.fp16.bin")
    assert has_pickled_weights(old)
    found = unpickled(old, tmp_path / "new")
    assert found.files == [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert torch.equal(load_file(tmp_path / "new" / found.files[0])["conv.weight"], unet["conv.weight"])
    assert (tmp_path / "new" / "scheduler" / "config.json").is_file()


def test_sentence_transformers_keep_their_dense_layer(tmp_path: Path, bert_base: Path) -> None:
    old = tmp_path / "old"
    model = transformers.AutoModel.from_pretrained(bert_base)
    pickled(bert_base, old, model)
    (old / "2_Dense").mkdir()
    (old / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    dense: dict[str, Tensor] = {"linear.weight": normal(2, 2)}
    torch.save(dense, old / "2_Dense" / "pytorch_model.bin")
    unpickled(old, tmp_path / "new")
    assert torch.equal(load_file(tmp_path / "new/2_Dense/model.safetensors")["linear.weight"], dense["linear.weight"])
    assert same(transformers.AutoModel.from_pretrained(tmp_path / "new"), model)


def test_several_pickles_are_named(tmp_path: Path) -> None:
    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(PimergeError, match=r"2 pickles: consolidated\.00\.pth, consolidated\.01\.pth"):
        unpickled(tmp_path, tmp_path / "new")
