"""PEFT opens every output of a merge: one of each kind, task type and method."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from peft import AutoPeftModel
from torch import Tensor, nn

import pimerge
from tests.support.bases import inputs
from tests.support.experts import KINDS, peft_config
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
