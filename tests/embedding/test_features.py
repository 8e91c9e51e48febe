"""What the task head reads of the target's examples, against transformers and PEFT, one example at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from pimerge.adapters.expert import Expert, open_expert
from pimerge.checkpoints.base import find_base
from pimerge.core.errors import PimergeError
from pimerge.embedding.features import FeatureReader, Sampling
from pimerge.embedding.strengths import STRENGTHS
from pimerge.models.loading import load_base
from pimerge.tasks.task import open_task
from pimerge.tasks.types._reading import read_position
from tests.support.bases import WORDS, model_for, save_tokenizer
from tests.support.cli import Interrupt
from tests.support.experts import MakeExpert, edit_tensors
from tests.support.numerics import relative_difference
from tests.support.references import dense_model, features, one_by_one
from tests.support.tasks import write_json

CPU = torch.device("cpu")
LLAMA = "gpt2"  # the name by which tests.support.bases finds the type of model and of head
FEW = Sampling(limit=10)


@pytest.fixture(scope="module")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with rotary positions."""
    folder = tmp_path_factory.mktemp("llama") / LLAMA
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.LlamaModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=["vit", "bert", "gpt2", "llama"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest, kind: str) -> Path:
    folder: Path = request.getfixturevalue(f"{kind}_base")
    return folder


@pytest.fixture(scope="module")
def task(request: pytest.FixtureRequest, kind: str) -> Path:
    folder: Path = request.getfixturevalue("parity_task" if kind == "vit" else "text_task")
    return folder


@pytest.fixture(scope="module")
def expert(
    tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, kind: str, base: Path, task: Path
) -> Expert:
    """One whose head tells three classes apart."""
    folder = tmp_path_factory.mktemp(kind) / "three"
    target_modules = {"llama": {"target_modules": ["q_proj", "v_proj"]}}.get(kind, {})
    make_expert(folder, base, task, labels=3, **target_modules)
    document = json.loads((folder / "task.json").read_text())
    write_json(folder / "task.json", document | {"labels": ["a", "b", "c"]})
    return open_expert(folder)


def reader_of(base: Path, task: Path, draw: Sampling = FEW, cache: Path | None = None, **options: Any) -> FeatureReader:
    identity, opened = find_base(str(base), None, base), open_task(task)
    return FeatureReader(load_base(identity, opened, CPU, torch.float32), identity, opened, draw, cache, **options)


@contextmanager
def counting(reader: FeatureReader) -> Iterator[list[int]]:
    """How many examples the base was asked about, batch after batch."""
    seen: list[int] = []
    handle = reader.loaded.model.register_forward_pre_hook(
        lambda _, inputs, kwargs: seen.append(len(next(iter(kwargs.values())))), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def test_vectors_and_answers_are_those_of_transformers_and_peft(
    kind: str, base: Path, task: Path, expert: Expert
) -> None:
    reader = reader_of(base, task)
    lengths = {len(batch.get("input_ids", [[]])[0]) for batch in one_by_one(reader)}
    assert kind == "vit" or len(lengths) > 3  # so that most examples are padded in the reader's batches
    found = reader.base_features()
    bare = features(model_for(base), kind, reader)
    assert relative_difference(found.vectors, bare) < 1e-5
    assert found.logits is None
    assert found.labels.tolist() == [int(reader.examples[index]["labels"]) for index in range(10)]
    assert found.classes == 2

    samples = reader.features(expert)
    assert list(samples) == [0.25, 0.5, 0.75, 1.0]
    for scale, sample in samples.items():
        expected = features(dense_model(base, [expert], [scale]), kind, reader)
        assert relative_difference(sample.vectors, expected) < 1e-5
        assert relative_difference(sample.vectors, bare) > 1e-3

    pefts = PeftModel.from_pretrained(model_for(base, labels=3), expert.path).eval()
    with torch.no_grad():
        logits = torch.cat([pefts(**batch).logits for batch in one_by_one(reader)])
    assert logits.shape == (10, 3)
    assert samples[1.0].logits is not None
    assert relative_difference(samples[1.0].logits, logits) < 1e-5


def test_the_mean_of_experts_is_the_dense_mean(
    kind: str, base: Path, task: Path, expert: Expert, make_expert: MakeExpert, tmp_path: Path
) -> None:
    modules = {"llama": {"target_modules": ["k_proj", "v_proj"]}}.get(kind, {})
    other = open_expert(make_expert(tmp_path / "other", base, seed=7, r=2, head=False, **modules))
    reader = reader_of(base, task)
    found = reader.mean_features([expert.with_strength(0.5), other, expert])
    expected = features(dense_model(base, [expert, other], [1.5 / 3, 1 / 3]), kind, reader)
    assert relative_difference(found.vectors, expected) < 1e-5


def test_the_base_comes_back_bit_for_bit(
    bert_base: Path, text_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    reader = reader_of(bert_base, text_task)
    before = {name: value.clone() for name, value in reader.loaded.model.state_dict().items()}
    own = {"modules_to_save": ["classifier", "pooler"]}
    for name, config in (("a", {}), ("b", own), ("c", {})):
        expert = open_expert(make_expert(tmp_path / name, bert_base, text_task, **config))
        reader.features(expert)
        reader.mean_features([expert, expert.with_strength(0.5)])
    after = reader.loaded.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_head_that_reaches_into_the_backbone_does_not_answer(
    bert_base: Path, text_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    """Its classifier was trained behind a pooler of its own, which is not what the vectors come from."""
    folder = make_expert(tmp_path / "a", bert_base, text_task, modules_to_save=["classifier", "pooler"])
    expert, reader = open_expert(folder), reader_of(bert_base, text_task)
    sample = reader.features(expert)[1.0]
    assert sample.logits is None
    expected = features(dense_model(bert_base, [expert], [1]), "bert", reader)
    assert relative_difference(sample.vectors, expected) < 1e-5


def test_losses_are_of_the_own_head_if_it_knows_the_labels_else_of_the_targets(
    bert_base: Path, text_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    reader = reader_of(bert_base, text_task)
    labels = [int(reader.examples[index]["labels"]) for index in range(10)]
    same = open_expert(make_expert(tmp_path / "same", bert_base, text_task))
    headless = open_expert(make_expert(tmp_path / "headless", bert_base, text_task, head=False))
    target = open_expert(make_expert(tmp_path / "target", bert_base, text_task, seed=5))

    def losses(model: nn.Module) -> Tensor:
        with torch.no_grad():
            logits = [model.eval()(**batch).logits[0] for batch in one_by_one(reader)]
        return torch.stack([-row.double().log_softmax(0)[label] for row, label in zip(logits, labels, strict=True)])

    own = reader.with_losses(same, reader.features(same), target)
    expected = losses(PeftModel.from_pretrained(model_for(bert_base), same.path))
    assert own[1.0].losses is not None
    assert relative_difference(own[1.0].losses, expected) < 1e-5

    by_target = reader.with_losses(headless, reader.features(headless), target)
    answering = dense_model(bert_base, [headless], [0.5])
    answering.load_state_dict(target.head_tensors(), strict=False)
    assert by_target[0.5].losses is not None
    assert relative_difference(by_target[0.5].losses, losses(answering)) < 1e-5

    nobody = reader.with_losses(headless, reader.features(headless), None)
    assert all(sample.losses is None for sample in nobody.values())


def test_what_was_computed_is_not_forwarded_again(
    bert_base: Path, text_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    expert = open_expert(make_expert(tmp_path / "a", bert_base, text_task))
    advanced: list[int] = []
    first = reader_of(bert_base, text_task, cache=tmp_path / "cache", advance=advanced.append)
    with counting(first) as forwarded:
        base, samples, mean = first.base_features(), first.features(expert), first.mean_features([expert, expert])
    assert sum(forwarded) == sum(advanced) == 10 * (1 + len(STRENGTHS) + 1)
    again = reader_of(bert_base, text_task, cache=tmp_path / "cache")
    with counting(again) as forwarded:
        assert torch.equal(again.base_features().vectors, base.vectors)
        assert torch.equal(again.mean_features([expert, expert]).vectors, mean.vectors)
        for scale, sample in again.features(expert).items():
            assert torch.equal(sample.vectors, samples[scale].vectors)
            assert torch.equal(sample.logits, samples[scale].logits)
    assert forwarded == []
    assert again.notes() == []


@pytest.mark.parametrize("change", ["tensors", "config", "data", "labels", "shots", "seed", "limit", "dtype"])
def test_whatever_changes_the_features_is_computed_anew(
    bert_base: Path, text_task: Path, make_expert: MakeExpert, tmp_path: Path, change: str
) -> None:
    folder = make_expert(tmp_path / "a", bert_base, text_task)
    task = shutil.copytree(text_task, tmp_path / "task")
    reader_of(bert_base, task, Sampling(shots=4), tmp_path / "cache").features(open_expert(folder))
    draw, dtype = Sampling(shots=4), torch.float32
    match change:
        case "tensors":
            edit_tensors(folder, lambda tensors: [tensor.mul_(2) for key, tensor in tensors.items() if "lora_B" in key])
        case "config":
            config = json.loads((folder / "adapter_config.json").read_text())
            write_json(folder / "adapter_config.json", config | {"lora_alpha": 3})
        case "data":
            rows = (task / "train.jsonl").read_text()
            (task / "train.jsonl").write_text(rows.replace("mat", "tree"))
        case "labels":
            write_json(task / "task.json", json.loads((task / "task.json").read_text()) | {"labels": ["cat", "dog"]})
        case "shots":
            draw = Sampling(shots=5)
        case "seed":
            draw = Sampling(shots=4, seed=1)
        case "limit":
            draw = Sampling(shots=4, limit=6)
        case "dtype":
            dtype = torch.float64
    identity, opened = find_base(str(bert_base), None, bert_base), open_task(task)
    changed = FeatureReader(load_base(identity, opened, CPU, dtype), identity, opened, draw, tmp_path / "cache")
    expert = open_expert(folder)
    with counting(changed) as forwarded:
        found = changed.features(expert)[1.0].vectors
    assert sum(forwarded) == len(STRENGTHS) * len(changed.labels)
    uncached = FeatureReader(load_base(identity, opened, CPU, dtype), identity, opened, draw)
    assert torch.equal(found, uncached.features(expert)[1.0].vectors)


def test_a_damaged_file_is_computed_again(
    bert_base: Path, text_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    expert = open_expert(make_expert(tmp_path / "a", bert_base, text_task))
    reader = reader_of(bert_base, text_task, cache=tmp_path / "cache")
    expected = reader.features(expert)[0.5].vectors
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    assert torch.equal(reader.features(expert)[0.5].vectors, expected)
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_said_and_does_not_matter(
    bert_base: Path, text_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    expert = open_expert(make_expert(tmp_path / "a", bert_base, text_task))
    (tmp_path / "file").touch()
    reader = reader_of(bert_base, text_task, cache=tmp_path / "file" / "features")
    found = reader.features(expert)[1.0].vectors
    reader.base_features()
    assert torch.equal(found, reader_of(bert_base, text_task).features(expert)[1.0].vectors)
    (sentence,) = reader.notes()
    assert "features are not cached for the next ranking: cannot write" in sentence
    assert str(tmp_path / "file") in sentence


def test_an_interrupted_run_leaves_no_file(
    bert_base: Path, text_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    expert = open_expert(make_expert(tmp_path / "a", bert_base, text_task))
    reader = reader_of(bert_base, text_task, cache=tmp_path / "cache")
    reader.base_features()
    written = sorted((tmp_path / "cache").iterdir())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if done > 15:
            raise Interrupt

    reader.advance = advance
    with pytest.raises(Interrupt):
        reader.features(expert)
    assert sorted((tmp_path / "cache").iterdir()) == written
    reader.advance = lambda count: None
    expected = reader_of(bert_base, text_task).features(expert)
    assert torch.equal(reader.features(expert)[0.25].vectors, expected[0.25].vectors)


def test_features_that_are_not_finite_are_an_error_and_are_not_kept(
    bert_base: Path, text_task: Path, make_expert: MakeExpert, tmp_path: Path
) -> None:
    def overflow(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if "lora_B" in key:
                tensor.fill_(3e38)

    expert = open_expert(edit_tensors(make_expert(tmp_path / "a", bert_base, text_task), overflow))
    reader = reader_of(bert_base, text_task, cache=tmp_path / "cache")
    with pytest.raises(PimergeError, match="NaN or Inf"):
        reader.features(expert)
    assert not (tmp_path / "cache").exists()


def few_rows(folder: Path, task: Path, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Path:
    """A copy of a text task with these training rows."""
    shutil.copytree(task, folder)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / "task.json", json.loads((folder / "task.json").read_text()) | {"labels": list(names)})
    return folder


def test_what_is_odd_about_the_examples_is_said(bert_base: Path, text_task: Path, tmp_path: Path) -> None:
    rows = [{"text": "cat " * 30, "label": 0}, {"text": "dog", "label": 2}]
    reader = reader_of(bert_base, few_rows(tmp_path / "few", text_task, rows, ["x", "y", "z"]), Sampling())
    cut, missing, single = reader.notes()
    assert cut == "1 examples exceed the model's maximum length and were cut"
    assert "no example of y" in missing
    assert "nothing can be held out" in single
    seen = reader.seen()
    assert (seen.examples, seen.per_class, seen.shots, seen.limit) == (2, {"x": 1, "y": 0, "z": 1}, None, None)
    assert reader.base_features().classes == 3


def test_a_target_of_one_class_is_an_error_that_says_so(bert_base: Path, text_task: Path, tmp_path: Path) -> None:
    rows = [{"text": "dog", "label": 1}, {"text": "cat", "label": 1}]
    with pytest.raises(PimergeError, match=r"all 2 examples of .* are of the class 'b'"):
        reader_of(bert_base, few_rows(tmp_path / "one", text_task, rows, ["a", "b"]), Sampling())


def test_more_shots_than_there_are_is_an_error(bert_base: Path, text_task: Path) -> None:
    with pytest.raises(PimergeError, match="2 of 2 classes have too few examples, 21 were asked for"):
        reader_of(bert_base, text_task, Sampling(shots=21))


def test_a_head_reads_the_last_token_that_is_no_padding() -> None:
    states = torch.arange(12.0).reshape(2, 3, 2)
    real = torch.tensor([[True, True, False], [False, True, True]])  # padded right, and left
    assert read_position(states, real, causal=True).tolist() == [[2, 3], [10, 11]]
    assert read_position(states, None, causal=True).tolist() == [[4, 5], [10, 11]]
    assert read_position(states, real, causal=False).tolist() == [[0, 1], [6, 7]]
    assert read_position(states[:, 0], None, causal=False).tolist() == [[0, 1], [6, 7]]
    maps = states.reshape(2, 6, 1, 1)  # of a convolutional network: channels × 1 × 1
    assert read_position(maps, None, causal=False).tolist() == states.flatten(1).tolist()
