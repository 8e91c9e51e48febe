"""Sketches: what they promise of inner products, over many pairs and draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pimerge.adapters.expert import open_expert
from pimerge.embedding.random_projection import (
    BLOCKS,
    DIRECTIONS,
    SIZE,
    WIDTH,
    from_texts,
    project,
    projection,
    to_text,
    update_embedding,
)
from tests.support.experts import dense_deltas, raw_expert

TRIALS = 300


def pair(cosine: float, kind: str, trial: int) -> tuple[Tensor, Tensor]:
    """Two vectors of norm 1 with this cosine; ``few``: with few entries that are not zero."""
    generator = torch.Generator().manual_seed(trial)
    size = 3 if kind == "few" else 400
    a, b = torch.randn(2, size, generator=generator, dtype=torch.float64)
    a = a / a.norm()
    b = b - (a @ b) * a
    return a, cosine * a + (1 - cosine**2) ** 0.5 * b / b.norm()


@pytest.mark.parametrize("kind", ["many", "few"])
@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.95, 1.0])
def test_inner_products_are_right_in_the_mean_and_as_wrong_as_stated(cosine: float, kind: str) -> None:
    errors = []
    for trial in range(TRIALS):
        a, b = pair(cosine, kind, trial)
        # another name, other draws
        errors.append(float(project({f"t{trial}": a}) @ project({f"t{trial}": b})) - cosine)
    stated = (2 / SIZE) ** 0.5
    assert abs(np.mean(errors)) < 4 * stated / TRIALS**0.5
    assert np.sqrt(np.mean(np.square(errors))) < 1.2 * stated
    if cosine == 0 and kind == "many":
        assert np.std(errors) == pytest.approx((1 / SIZE) ** 0.5, rel=0.2)  # so nothing is left unsaid


def test_an_entry_goes_to_one_place_of_each_block() -> None:
    one = torch.zeros(50)
    one[17] = 3.0
    found = project({"q": one}).view(BLOCKS, WIDTH)
    assert found.count_nonzero(1).tolist() == [1] * BLOCKS
    assert found.abs().sum(1).tolist() == pytest.approx([3 / BLOCKS**0.5] * BLOCKS)


def test_a_sketch_is_linear_and_adds_up_over_the_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ({n: torch.randn(4, 5, generator=generator, dtype=torch.float64) for n in "pq"} for _ in range(2))
    mixed = {name: 2 * a[name] - b[name] for name in a}
    torch.testing.assert_close(project(mixed), 2 * project(a) - project(b))
    torch.testing.assert_close(project(a), project({"p": a["p"]}) + project({"q": a["q"]}))
    assert torch.equal(project(dict(reversed(a.items()))), project(a))
    assert not torch.allclose(project({"p": a["p"]}), project({"q": a["p"]}))  # its name decides where it goes


def test_nothing_has_an_empty_sketch_that_reads_back() -> None:
    assert not project({}).any()
    assert not from_texts([to_text(project({}))]).any()


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_texts_read_back_to_within_half_a_level(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [scale * torch.randn(SIZE, generator=generator, dtype=torch.float64) for _ in range(3)]
    texts = [to_text(row) for row in rows]
    assert {len(text) for text in texts} == {688}
    found = from_texts(texts)
    assert found.shape == (3, SIZE)
    for row, back in zip(rows, found, strict=True):
        level = float(row.abs().max()) / 127
        assert np.abs(back - row.numpy()).max() <= level * 0.501


def test_reading_back_costs_as_much_as_is_said() -> None:
    errors = []
    for trial in range(TRIALS):
        a, b = (project({f"t{trial}": vector}) for vector in pair(0.5, "many", trial))
        back = from_texts([to_text(a), to_text(b)]).astype(np.float64)
        errors.append(float(back[0] @ back[1]) - float(a @ b))
    assert np.std(errors) < 0.005


def test_directions_are_orthonormal_and_all_of_them_if_there_are_few() -> None:
    for size in (1, DIRECTIONS - 1, DIRECTIONS):
        assert torch.equal(projection("q", size), torch.eye(size))
    drawn = projection("q", 300)
    assert drawn.shape == (300, DIRECTIONS)
    torch.testing.assert_close(drawn.T @ drawn, torch.eye(DIRECTIONS), atol=1e-5, rtol=0)
    assert not torch.allclose(drawn, projection("k", 300))


def test_draws_follow_from_names_alone_in_any_process() -> None:
    code = (
        "import torch; from pimerge.embedding.random_projection import projection, project; torch.manual_seed(5);"
        "print(projection('q', 100)[3, 2].item(), project({'q': torch.arange(9.0)}).nonzero()[:, 0].tolist())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(
        " ", 1
    )
    assert float(found[0]) == pytest.approx(projection("q", 100)[3, 2].item(), rel=1e-5)
    assert found[1].strip() == str(project({"q": torch.arange(9.0)}).nonzero()[:, 0].tolist())


def test_texts_are_read_without_torch() -> None:
    code = (
        "import sys; from pimerge.embedding.random_projection import from_texts; from_texts(sys.argv[1:]);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, to_text(project({"q": torch.ones(3)}))], check=True)


MODULES = 24


def test_products_of_projected_updates_are_near_those_of_the_updates(tmp_path: Path) -> None:
    experts = []
    generator = torch.Generator().manual_seed(0)
    shapes = [(100, 4, 150), (70, 4, 30), (64, 4, 300)]
    shared = [
        (torch.randn(r, i, generator=generator), torch.randn(o, r, generator=generator)) for o, r, i in shapes * 8
    ]
    for number in range(3):
        updates = {
            f"layers.{i}": (
                A + torch.randn(A.shape, generator=generator),
                B + torch.randn(B.shape, generator=generator),
            )
            for i, (A, B) in enumerate(shared)
        }
        experts.append(open_expert(raw_expert(tmp_path / str(number), updates, lora_alpha=6)))
    seen = [update_embedding(expert) for expert in experts]
    dense = [dense_deltas(expert) for expert in experts]
    assert len(seen[0]) == MODULES

    def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sum(float((a[n].double() * b[n].double()).sum()) for n in a) / (norm(a) * norm(b))

    def norm(a: dict[str, Tensor]) -> float:
        return sum(float(value.double().square().sum()) for value in a.values()) ** 0.5

    for i in range(3):
        assert norm(seen[i]) == pytest.approx(norm(dense[i]), rel=0.1)
        for j in range(i):
            assert cosine(seen[i], seen[j]) == pytest.approx(cosine(dense[i], dense[j]), abs=4 / 64**0.5 / MODULES**0.5)
    assert max(abs(cosine(dense[i], dense[j])) for i in range(3) for j in range(i)) > 0.2


def test_small_updates_are_taken_whole(tmp_path: Path) -> None:
    updates = {"q": (torch.arange(6.0).reshape(2, 3), torch.ones(5, 2))}
    expert = open_expert(raw_expert(tmp_path, updates, lora_alpha=6))
    torch.testing.assert_close(update_embedding(expert)["q"].double(), dense_deltas(expert)["q"])
