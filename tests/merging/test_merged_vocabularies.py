"""Full checkpoints whose vocabularies have several sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pimerge.core.errors import PimergeError
from pimerge.merging.merge import merge
from tests.support.cli import Shell
from tests.support.into_cases import llama, opened

ROWS = {"model.embed_tokens.weight", "lm_head.weight"}


def tokenizer(folder: Path, tokens: int, first: str = "a") -> None:
    """Save the vocabulary of a tokenizer."""
    vocabulary = {first if number == 0 else f"t{number}": number for number in range(tokens)}
    document = {"model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(document))


def three(folder: Path, sizes: tuple[int, int, int] = (64, 64, 68), **fields: Any) -> list[Any]:
    """A base and two experts with tokenizers."""
    found = []
    for seed, (name, size) in enumerate(zip(("base", "a", "b"), sizes, strict=True)):
        found.append(llama(folder / name, seed=seed, vocab_size=size, **fields))
        tokenizer(folder / name, size)
    return found


def merged(folder: Path, output: str, *experts: str, **options: Any) -> dict[str, torch.Tensor]:
    """Merge by task arithmetic, and return the tensors."""
    options = {"method": "task-arithmetic", "scale": 0.5, "head": "average"} | options
    paths = [folder / name for name in experts or ("a", "b")]
    merge(paths, base=str(folder / "base"), output=folder / output, ranking=folder / "none.json", **options)
    return load_file(folder / output / "model.safetensors")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [(64, 64, 68), (68, 64, 68), (64, 70, 68), (60, 64, 64)])
def test_common_rows_are_merged_and_the_others_copied(tied: bool, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    models = three(tmp_path, sizes, tie_word_embeddings=tied)
    found = merged(tmp_path, "out")
    base, *experts = (model.state_dict() for model in models)
    common, every = min(sizes), [base, *experts]
    for key in found:
        rows = common if key in ROWS else len(base[key])
        wanted = base[key][:rows] + 0.5 * sum(expert[key][:rows] - base[key][:rows] for expert in experts)
        torch.testing.assert_close(found[key][:rows], wanted, rtol=1e-5, atol=1e-5)
    for key in ROWS & found.keys():
        assert len(found[key]) == max(sizes)
        for row in range(common, max(sizes)):
            having = [each[key][row] for each in every if row < len(each[key])]
            first = having[0]
            deltas = [each[key][row] - first for each in experts if row < len(each[key])]
            torch.testing.assert_close(
                found[key][row], first + 0.5 * sum(deltas, torch.zeros(())), rtol=1e-5, atol=1e-5
            )
    model = opened(tmp_path / "out", models[0])
    assert model.config.vocab_size == max(sizes)
    largest = ("base", "a", "b")[sizes.index(max(sizes))]
    written, own = (tmp_path / name / "tokenizer.json" for name in ("out", largest))
    assert written.read_bytes() == own.read_bytes()


def test_what_is_not_known_to_be_the_same_tokens_is_refused_in_one_line(tmp_path: Path, shell: Shell) -> None:
    three(tmp_path)
    given = ("merge", tmp_path / "a", tmp_path / "b", "--base", tmp_path / "base", "--method", "ties", "-o", "out")
    tokenizer(tmp_path / "b", 64)
    result = shell(*given)
    assert (result.code, Path("out").exists()) == (3, False)
    assert "'b' has a vocabulary of 68 tokens, the base 'base' of 64: its tokenizer names none" in result.err
    assert result.err.count("\n") == 2, result.err
    tokenizer(tmp_path / "b", 68, first="other")
    assert "token 0 is 'a' in the base and 'other' here" in shell(*given).err
    (tmp_path / "b" / "tokenizer.json").unlink()
    assert "without both tokenizers" in shell(*given).err
    assert shell(*given, "--exclude", "*embed_tokens*", "--exclude", "lm_head*").code == 0
    kept, base = load_file("out/model.safetensors"), load_file(tmp_path / "base" / "model.safetensors")
    assert all(torch.equal(kept[key], base[key]) is (key in ROWS) for key in base)


def test_one_size_with_other_tokens_is_refused_unless_the_rows_are_not_merged(tmp_path: Path, shell: Shell) -> None:
    three(tmp_path, (64, 64, 64))
    given = ("merge", tmp_path / "a", tmp_path / "b", "--base", tmp_path / "base", "--method", "ties", "-o", "out")
    tokenizer(tmp_path / "b", 64, first="other")
    result = shell(*given)
    assert (result.code, Path("out").exists()) == (3, False)
    assert "token 0 is 'a' in the base and 'other' here" in result.err
    for name in ("base", "a", "b"):  # a token that the base keeps free can have one name among the experts
        tokenizer(tmp_path / name, 64, first={"base": "<|reserved_0|>", "a": "<image>", "b": "<video>"}[name])
    assert "token 0 is '<image>' in 'a' and '<video>' here" in shell(*given).err
    assert shell(*given, "--exclude", "*embed_tokens*", "--exclude", "lm_head*").code == 0
    tokenizer(tmp_path / "b", 64, first="<image>")
    assert shell(*given, "--force").code == 0


def test_a_dry_run_says_it(tmp_path: Path, shell: Shell) -> None:
    three(tmp_path)
    given = ("merge", tmp_path / "a", tmp_path / "b", "--base", tmp_path / "base", "--method", "ties", "-o", "out")
    assert "vocabularies of 64, 68 tokens: their common rows are merged" in " ".join(
        shell(*given, "--dry-run").out.split()
    )


def test_other_shapes_stay_refused(tmp_path: Path) -> None:
    three(tmp_path)
    llama(tmp_path / "b", seed=2, intermediate_size=32)
    with pytest.raises(PimergeError, match="has the shape"):
        merged(tmp_path, "out")
