"""PEFT opens every output of a merge: one of each kind, task type and method."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, AutoPeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pimerge
from pimerge.core.errors import PimergeError
from pimerge.merging.method import METHODS
from tests.support.bases import inputs, model_for
from tests.support.experts import KINDS, peft_config, raw_expert, updates_of
from tests.support.peft_outputs import adapter_of, open_strictly

HEADED = {
    "SEQ_CLS": "BertForSequenceClassification",
    "TOKEN_CLS": "BertForTokenClassification",
    "QUESTION_ANS": "BertForQuestionAnswering",
}


@pytest.fixture(scope="module")
def headed_base(tmp_path_factory: pytest.TempPathFactory, bert_base: Path) -> dict[str, Path]:
    """Task type → a BERT whose checkpoint has the head of that type."""
    found = {}
    for task_type, name in HEADED.items():
        found[task_type] = tmp_path_factory.mktemp("headed") / "bert"
        torch.manual_seed(0)
        getattr(transformers, name).from_pretrained(bert_base).save_pretrained(found[task_type])
    return found


def model_of(base: Path, task_type: str) -> nn.Module:
    return getattr(transformers, HEADED[task_type]).from_pretrained(base).eval()  # type: ignore[no-any-return]


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs("bert"))[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["lora", "loha", *KINDS])
@pytest.mark.parametrize("task_type", HEADED)
def test_a_result_without_a_head_loads_under_the_head_of_the_base(
    task_type: str, kind: str, headed_base: dict[str, Path], tmp_path: Path
) -> None:
    base = headed_base[task_type]
    expert = adapter_of(model_of(base, task_type), peft_config(kind, "bert", task_type=task_type), tmp_path / "expert")
    pimerge.merge(tmp_path / "expert", base=base, head="none", output=tmp_path / "merged")
    found = open_strictly(model_of(base, task_type), tmp_path / "merged")
    torch.testing.assert_close(answers(found), answers(expert), rtol=1e-4, atol=1e-5)


def test_the_code_on_the_card_loads_a_result_without_a_head(headed_base: dict[str, Path], tmp_path: Path) -> None:
    base = headed_base["SEQ_CLS"]
    expert = adapter_of(
        model_of(base, "SEQ_CLS"), peft_config("lora", "bert", task_type="SEQ_CLS"), tmp_path / "expert"
    )
    pimerge.merge(tmp_path / "expert", base=base, head="none", output=tmp_path / "merged")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "merged" / "README.md").read_text(), re.DOTALL)
    assert code
    found: dict[str, nn.Module] = {}
    exec(code[1].replace("path/to/this/folder", str(tmp_path / "merged")), found)
    torch.testing.assert_close(answers(found["model"].eval()), answers(expert), rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["task_type"] is None
    loaded = AutoPeftModel.from_pretrained(str(tmp_path / "merged")).eval()
    torch.testing.assert_close(answers(loaded), answers(expert), rtol=1e-4, atol=1e-5)


def test_a_router_of_lower_rank_than_the_experts_loads(tmp_path: Path) -> None:
    """PEFT moves the experts and the router of a Mixtral to fused parameters; the router has rank 4 at most."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.MixtralConfig(**sizes, vocab_size=32, num_local_experts=4, num_key_value_heads=2)
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    block, shapes = "model.layers.0.block_sparse_moe", {"model.layers.0.self_attn.q_proj": (16, 3, 16)}
    shapes[f"{block}.gate"] = (4, 3, 16)
    for expert in range(4):
        shapes |= {f"{block}.experts.{expert}.{w}": (24, 3, 16) for w in ("w1", "w3")}
        shapes[f"{block}.experts.{expert}.w2"] = (16, 3, 24)
    for name, seed in (("a", 1), ("b", 1000)):
        raw_expert(
            tmp_path / name, updates_of(shapes, seed), r=3, lora_alpha=3, rank_pattern={}, alpha_pattern={},
            base_model_name_or_path="../base", target_modules=["q_proj", "gate", "w1", "w2", "w3"],
        )  # fmt: skip
    experts = [tmp_path / "a", tmp_path / "b"]
    pimerge.merge(experts, method="interpolated", weights=[0.7, 0.4], output=tmp_path / "merged")

    def weights(folder: Path | None) -> dict[str, Tensor]:
        model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base")
        return dict((model if folder is None else open_strictly(model, folder).merge_and_unload()).named_parameters())

    base, merged, (a, b) = weights(None), weights(tmp_path / "merged"), map(weights, experts)
    for name, own in base.items():
        torch.testing.assert_close(merged[name] - own, 0.7 * (a[name] - own) + 0.4 * (b[name] - own))


def test_an_update_of_a_module_that_the_head_replaces_is_refused(tmp_path: Path) -> None:
    saved = {"base_model.model.score.weight": torch.ones(2, 4)}
    raw_expert(tmp_path / "a", updates_of({"q": (4, 2, 4)}), saved, modules_to_save=["score"])
    raw_expert(tmp_path / "b", updates_of({"q": (4, 2, 4), "score": (2, 1, 4)}))
    with pytest.raises(PimergeError, match="'b' updates 'score' of the base, but the head of the result replaces"):
        pimerge.merge([tmp_path / "a", tmp_path / "b"], target=str(tmp_path / "a"), output=tmp_path / "m")
    pimerge.merge([tmp_path / "a", tmp_path / "b"], head="none", output=tmp_path / "m")


class Grouped(nn.Module):
    """A net that transformers does not know, with convolutions in groups and without."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 6, 3, groups=2)
        self.plain = nn.Conv2d(6, 6, 1)
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.plain(self.grouped(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("known", [True, False])
def test_a_convolution_in_groups_is_merged_as_peft_computes_it(known: bool, kind: str, tmp_path: Path) -> None:
    """Into an adapter and into the base, in a model that transformers knows and in one that it does not know."""
    base = tmp_path / "base"
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
    net: Any = transformers.ConvNextModel(transformers.ConvNextConfig(**sizes)) if known else Grouped()
    if known:
        net.save_pretrained(base)
    else:
        base.mkdir()
        save_file(net.state_dict(), base / "model.safetensors")
        (base / "config.json").write_text("{}")
    targets = ["dwconv", "pwconv1"] if known else ["grouped", "plain", "out"]
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind.upper()]
    for seed, name in enumerate("ab"):
        adapter_of(copy.deepcopy(net), config(r=2, target_modules=targets), tmp_path / name, seed)
    given: dict[str, Any] = {"method": "interpolated", "weights": [0.7, 0.4], "base": base}
    pimerge.merge([tmp_path / "a", tmp_path / "b"], **given, output=tmp_path / "merged")

    def weights(folder: Path) -> dict[str, Tensor]:
        return open_strictly(copy.deepcopy(net), folder).merge_and_unload().state_dict()  # type: ignore[no-any-return]

    own, merged, a, b = net.state_dict(), *(weights(tmp_path / name) for name in ("merged", "a", "b"))
    for name, weight in own.items():
        expected = weight + 0.7 * (a[name] - weight) + 0.4 * (b[name] - weight)
        torch.testing.assert_close(merged[name], expected)
    pimerge.merge([tmp_path / "a", tmp_path / "b"], **given, into=base, output=tmp_path / "full")
    found = load_file(tmp_path / "full" / "model.safetensors")
    torch.testing.assert_close(found, {name: merged[name] for name in found})


def test_an_update_of_a_head_that_the_base_does_not_have_is_called_so(bert_base: Path, tmp_path: Path) -> None:
    query = "bert.encoder.layer.0.attention.self.query"
    updates = updates_of({query: (16, 2, 16), "classifier": (2, 2, 16)})
    raw_expert(tmp_path / "e", updates, base_model_name_or_path=str(bert_base))
    with pytest.raises(PimergeError, match="the checkpoint has no 'classifier': the adapter updates a head") as caught:
        pimerge.merge(tmp_path / "e", into=bert_base, output=tmp_path / "full")
    assert "--exclude '*classifier'" in str(caught.value)


@pytest.mark.parametrize(
    "method", [each.name for each in METHODS if not {"fishers", "grams"} & set(each.needs) and not each.joins_target]
)
def test_peft_opens_the_result_of_every_method(method: str, bert_base: Path, tmp_path: Path) -> None:
    names = [f"bert.encoder.layer.{i}.attention.self.{part}" for i in range(2) for part in ("query", "value")]
    for seed, name in enumerate("ab"):
        updates = updates_of(dict.fromkeys(names, (16, 2 + seed, 16)), seed)
        raw_expert(tmp_path / name, updates, base_model_name_or_path=str(bert_base))
    pimerge.merge([tmp_path / "a", tmp_path / "b"], method=method, rank="auto", output=tmp_path / "m")
    open_strictly(model_for(bert_base), tmp_path / "m")


def test_a_bias_that_its_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    updates = {name: (A.half(), B.half()) for name, (A, B) in updates_of({"q": (2, 3, 4)}).items()}
    bias = {"base_model.model.q.lora_B.bias": torch.full((updates["q"][1].shape[0],), 6e4, dtype=torch.float16)}
    paths = [raw_expert(tmp_path / name, updates, bias, lora_bias=True) for name in "ab"]
    with pytest.raises(PimergeError, match="update of module 'q' is too large for"):
        pimerge.merge(paths, method="interpolated", weights=[1.0, 1.0], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
