"""What single tune methods do beyond one trained sum, against references by hand.

What holds for every method stands in ``contracts/test_tune_methods.py``.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import one_hot

from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from pimerge.tasks.examples import IGNORED
from pimerge.tasks.task import open_task
from pimerge.tuning.ensemble import ENSEMBLE_FILE, open_ensemble
from pimerge.tuning.fit import fit
from pimerge.tuning.loss import held_out_loss, mean_loss
from pimerge.tuning.method import open_tune_method
from pimerge.tuning.methods import distill
from pimerge.tuning.methods._expert_heads import similarity_weights, train_heads
from pimerge.tuning.mixed_expert import MixedExpert
from pimerge.tuning.options import TrainingOptions
from pimerge.tuning.session import TrainingOutcome, TuneRequest, open_session
from tests.support.bases import model_for
from tests.support.experts import MakeExpert, dense_deltas
from tests.support.numerics import logits_of, relative_difference
from tests.support.tasks import write_json

CPU = torch.device("cpu")
OPTIONS = TrainingOptions(epochs=2, shots=6, batch_size=8, lr=1e-2)


class Tried:
    """A session, a target and two experts of other strength."""

    def __init__(self, folder: Path, make_expert: MakeExpert, base: Path, task: Path) -> None:
        self.x, self.a, self.b = (
            open_expert(make_expert(folder / name, base, task, seed=seed)) for seed, name in enumerate("xab")
        )
        self.session = open_session(open_task(task), self.x.base, "cpu")

    def request(self, run: Path, options: TrainingOptions = OPTIONS, **fields: Any) -> TuneRequest:
        given = {"experts": [self.a, self.b], "target": self.x, "like": self.x, "scores": None, **fields}
        return TuneRequest(session=self.session, options=options, run=run, **given)


@pytest.fixture(scope="module")
def tried(
    tmp_path_factory: pytest.TempPathFactory, make_expert: MakeExpert, vit_base: Path, parity_task: Path
) -> Tried:
    return Tried(tmp_path_factory.mktemp("tried"), make_expert, vit_base, parity_task)


def test_the_held_out_loss_is_the_mean_over_examples(tried: Tried) -> None:
    session = tried.session
    examples, labels = session.task.examples("train", session.loaded.processor, session.loaded.config, limit=30)
    with torch.no_grad():
        logs = [
            session.loaded.model(pixel_values=examples.get(i)["pixel_values"][None]).logits[0].double().log_softmax(0)
            for i in range(30)
        ]
    expected = -sum(float(log[label]) for log, label in zip(logs, labels, strict=True)) / 30
    assert held_out_loss(session.loaded.model, examples, CPU) == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_shares_is_the_cross_entropy_where_there_are_any() -> None:
    logits = torch.randn(2, 3, 4)
    shares = torch.rand(2, 3, 4).softmax(-1)
    shares[0, 1] = shares[1, 2] = 0
    expected = -(shares * logits.log_softmax(-1)).sum() / 4
    torch.testing.assert_close(mean_loss(type("Output", (), {"logits": logits}), shares, label_smoothing=0.5), expected)


def test_an_ensemble_is_the_experts_as_they_were_each_under_a_head_of_its_own(tried: Tried, tmp_path: Path) -> None:
    method = open_tune_method("ensemble")
    scaled = [tried.a.with_strength(0.5), tried.b]
    with tried.session.restored(0) as undo:
        result = fit(method, tried.request(tmp_path / "run", experts=scaled, undo=undo))
        from pimerge.tuning.run import manifest_of

        request = tried.request(tmp_path)
        result.write(tmp_path / "tuned", manifest_of(method, request, result, scaled), False)
    members = open_ensemble(tmp_path / "tuned").experts
    assert [member.name for member in members] == ["0-base", "1-a", "2-b"]
    assert result.experts == ["(base)", "a", "b"]
    assert result.outcome.trained_parameters == 3 * (16 * 2 + 2)
    assert all(not delta.any() for delta in dense_deltas(members[0]).values())
    for member, expert in zip(members[1:], scaled, strict=True):
        own = dense_deltas(expert)
        for name, delta in dense_deltas(member).items():
            assert relative_difference(delta, own[name]) < 1e-6
    heads = [member.head_tensors()["classifier.weight"] for member in members]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])


def test_the_epochs_of_an_ensemble_are_divided_among_its_heads(tried: Tried, tmp_path: Path) -> None:
    options = replace(OPTIONS, epochs=6, holdout=0.0, batch_size=4)
    with tried.session.restored(0) as undo:
        assert fit(open_tune_method("ensemble"), tried.request(tmp_path, options, undo=undo)).outcome.epochs == 6
    with tried.session.restored(0) as undo:
        assert fit(open_tune_method("soup"), tried.request(tmp_path / "s", options, undo=undo)).outcome.epochs == 6
    with tried.session.restored(0) as undo:
        assert fit(open_tune_method("distill"), tried.request(tmp_path / "d", options, undo=undo)).outcome.epochs == 6


def test_an_ensemble_that_changed_is_refused(tried: Tried, tmp_path: Path) -> None:
    shutil.copytree(tried.a.path, tmp_path / "0-a")
    member = {"path": "0-a", "sha256": "0" * 64, "weight": 1.0}
    write_json(tmp_path / ENSEMBLE_FILE, {"members": [member, {**member, "path": "1-gone"}]})
    with pytest.raises(PimergeError) as caught:
        open_ensemble(tmp_path)
    assert "has changed since the ensemble was written" in str(caught.value)
    assert "1-gone" in str(caught.value)


def test_similar_experts_count_more(tried: Tried, tmp_path: Path) -> None:
    gains = [0.04, -0.02]
    found = similarity_weights(tried.request(tmp_path, scores=[0.9, 0.1], gains=gains), 25)
    shares = torch.tensor([0.0, *(gain / (0.1 / 5) for gain in gains)], dtype=torch.float64).softmax(0).tolist()
    assert found == pytest.approx(shares)  # the bare base gains nothing
    found = similarity_weights(tried.request(tmp_path, scores=[0.9, 0.1]), 25)
    shares = torch.tensor([0.9, 0.1], dtype=torch.float64).softmax(0).tolist()
    assert found == pytest.approx([1 / 3, *(2 / 3 * share for share in shares)])
    said: list[str] = []
    assert similarity_weights(tried.request(tmp_path, scores=[0.9, None], note=said.append), 25) == pytest.approx(
        [1 / 3] * 3
    )
    assert "weighted equally" in said[0]


def test_the_student_learns_the_mean_of_the_probabilities_and_the_labels(tried: Tried, tmp_path: Path) -> None:
    with tried.session.restored(0):
        trained = train_heads(tried.request(tmp_path), distill.METHOD, lambda *_: [0.5, 0.3, 0.2])
        kept = trained.kept
        batch = kept.batch(range(len(kept)))
        expected = torch.zeros(len(kept), 2)
        for (expert, head), weight in zip(trained.model.heads, [0.5, 0.3, 0.2], strict=True):
            own = None if expert is None else (tried.a, tried.b)[expert]
            base = model_for(Path(tried.session.base.source))
            model = base if own is None else PeftModel.from_pretrained(base, own.path)
            with torch.no_grad():
                layer: Any = model.get_submodule("classifier" if own is None else "base_model.model.classifier")
                layer = getattr(layer, "modules_to_save", {"default": layer})["default"]
                layer.weight.copy_(head["classifier.weight"])
                layer.bias.copy_(head["classifier.bias"])
            expected += weight * logits_of(model.eval(), batch).softmax(-1)
        for share in (0.0, 0.4, 1.0):
            found = torch.cat(distill._soft_targets(trained.model, kept, share, CPU))
            mixed = (1 - share) * expected + share * one_hot(batch["labels"], 2)
            torch.testing.assert_close(found, mixed, atol=1e-5, rtol=1e-4)
        taught = distill._with_targets(kept.joined(kept), [*found, *found])
        assert len(taught) == 2 * len(kept)
        again = taught.batch([len(kept), 1])
        torch.testing.assert_close(again["labels"], torch.stack([found[0], found[1]]))
        torch.testing.assert_close(again["pixel_values"], kept.batch([0, 1])["pixel_values"])


def test_words_are_taught_one_by_one() -> None:
    from pimerge.tasks.examples import Examples

    rows = [torch.tensor([IGNORED, 1, 0]), torch.tensor([IGNORED, 1])]
    examples = Examples(
        [3, 2],
        lambda i: {"labels": rows[i]},
        lambda batch: {"labels": torch.nn.utils.rnn.pad_sequence([each["labels"] for each in batch], True, IGNORED)},
    )
    shares = [torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([[0.3, 0.7]])]
    none = [0.0, 0.0]
    expected = torch.tensor([[none, [0.3, 0.7], none], [none, [0.1, 0.9], [0.8, 0.2]]])
    torch.testing.assert_close(distill._with_targets(examples, shares).batch([1, 0])["labels"], expected)


@pytest.mark.parametrize("good", [0, 1])
def test_the_search_finds_the_better_of_two_experts(tried: Tried, tmp_path: Path, good: int, monkeypatch: Any) -> None:
    """On a loss that is known: how far the weights are from taking one expert alone."""
    wanted = torch.eye(2)[good]

    def loss(model: Any, examples: Any, device: Any) -> float:
        layer = next(module for module in model.modules() if hasattr(module, "mixture"))
        return float((layer.mixture.logits[0] - wanted).square().sum())

    monkeypatch.setattr("pimerge.tuning.loss.held_out_loss", loss)
    method = open_tune_method("gradient-free", {"evaluations": 150})
    with tried.session.restored(0) as undo:
        result = fit(method, tried.request(tmp_path, undo=undo))
    for weights in result.weights.values():
        assert weights[good] > 0.75
        assert abs(weights[1 - good]) < 0.25
    assert result.outcome.trained_parameters == 16 * 2 + 2 + 2


def test_the_search_needs_nevergrad(tried: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(PimergeError, match=r"needs nevergrad.*\n.*pimerge\[gradient-free\]"):
        fit(open_tune_method("gradient-free"), tried.request(tmp_path))


@pytest.mark.parametrize(
    ("points", "taken"),
    [
        ([0.0, 5.0, 2.5], [0, 2]),
        ([1.0, 9.0, 8.0], [0]),
        ([2.5, 0.5, 0.0], [1, 0]),  # 0 makes it worse, 2.5 does not
        (None, [0, 1, 2]),
    ],
)
def test_the_soup_is_greedy(
    tried: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: list[float] | None, taken: list[int]
) -> None:
    """Algorithm 1 of arXiv 2203.05482, on runs that end where they are told to: the loss is the distance from 1."""
    ends = iter(points or [2.0, 4.0, 6.0])
    at: list[Tensor] = []

    def train(self: MixedExpert, kept: Any, held_out: Any, **changes: Any) -> TrainingOutcome:
        at[:] = self._trainable().values()
        end = next(ends)
        with torch.no_grad():
            for parameter in at:
                parameter.fill_(end)
        return TrainingOutcome(1, 0.5, None, (), 3, True)

    monkeypatch.setattr(MixedExpert, "train", train)
    monkeypatch.setattr("pimerge.tuning.loss.held_out_loss", lambda *_: abs(float(at[0].flatten()[0]) - 1.0))
    options = replace(OPTIONS, holdout=0.2 if points else 0.0)
    said: list[str] = []
    with tried.session.restored(0) as undo:
        fit(open_tune_method("soup"), tried.request(tmp_path, options, undo=undo, note=said.append))
        ends_of = points or [2.0, 4.0, 6.0]
        expected = sum(ends_of[number] for number in taken) / len(taken)
        for parameter in at:
            torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected))
    assert f"the soup holds {len(taken)} of 3 runs" in said


def test_scales_are_shared_as_asked(tried: Tried, tmp_path: Path) -> None:
    groups = {(): 4, ("shared",): 2, ("uniform",): 2, ("uniform", "shared"): 1}
    for options, count in groups.items():
        method = open_tune_method("scalearn", dict.fromkeys(options, True))
        with tried.session.restored(0) as undo:
            result = fit(
                method, tried.request(tmp_path / "-".join(options), replace(OPTIONS, weights_lr=0.3), undo=undo)
            )
        assert len({tuple(weights) for weights in result.weights.values()}) == count
        outputs = 1 if "uniform" in options else 16
        assert result.outcome.trained_parameters == 16 * 2 + 2 + count * 2 * outputs


def test_random_takes_the_targets_expert_and_fresh_ones(tried: Tried, tmp_path: Path) -> None:
    still = replace(OPTIONS, lr=1e-12, weights_lr=1e-12, weight_decay=0.0)
    method = open_tune_method("random")
    with tried.session.restored(0) as undo:
        result = fit(method, tried.request(tmp_path, still, undo=undo))
        assert result.experts == ["x", "random 1", "random 2"]
        found: Any = result.model
        own = dense_deltas(tried.x)
        for name, delta in own.items():
            parts = found.get_submodule(name).parts(3)
            assert relative_difference(parts[0].scaling * parts[0].B.double() @ parts[0].A.double(), delta) < 1e-6
            assert all(not part.B.abs().max() > 1e-6 for part in parts[1:])
            assert relative_difference(parts[1].A, parts[2].A) > 0.5


@pytest.mark.parametrize("words", [False, True])
def test_inputs_without_labels_are_learned_from(
    tmp_path: Path, make_expert: MakeExpert, bert_base: Path, text_task: Path, words: bool
) -> None:
    """In a file without the labels' column, or with one that is empty."""
    rows = [json.loads(line) for line in (text_task / "train.jsonl").read_text().splitlines()]
    column, name = ("tokens", "labels") if words else ("text", "label")
    labelled = [
        {"tokens": row["text"].split(), "labels": [int(word == "cat") for word in row["text"].split()]} for row in rows
    ]
    rows = labelled if words else rows
    for split, part in (
        ("train", rows),
        ("bare", [{column: row[column]} for row in rows]),
        ("empty", [{column: row[column], name: None} for row in rows]),
    ):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    a = open_expert(make_expert(tmp_path / "a", bert_base))
    shares = []
    for other in ("bare", "empty"):
        data = {"train": "train.jsonl", "test": "train.jsonl", "unlabelled": f"{other}.jsonl"}
        kind = "token-classification" if words else "text-classification"
        write_json(tmp_path / "task.json", {"type": kind, "data": data, "labels": ["dog", "cat"]})
        said: list[str] = []
        session = open_session(open_task(tmp_path), a.base, "cpu")
        request = TuneRequest(session, [a], None, a, None, OPTIONS, tmp_path / other, note=said.append)
        with session.restored(0) as undo:
            result = fit(open_tune_method("distill", {"unlabelled": 30}), replace(request, undo=undo))
        kept, _ = request.examples()
        assert result.examples == len(kept) + 30
        assert "also learning from 30 inputs without a label" in said
        shares.append(result.outcome.train_loss)
    assert shares[0] == shares[1]
