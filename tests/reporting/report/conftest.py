"""A folder with some of everything, whose names are hostile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pimerge.adapters.expert import open_expert
from pimerge.adapters.ranking_document import Candidate, NotComparable, Ranking, Target
from pimerge.core.files import json_text
from pimerge.evaluation.scoring import Score
from pimerge.tasks.intervals import Interval
from tests.support.documents import EVIL, SCORES, comparison
from tests.support.experts import MakeExpert
from tests.support.tasks import write_json


@pytest.fixture(scope="session")
def reported(
    tmp_path_factory: pytest.TempPathFactory, vit_base: Path, parity_task: Path, make_expert: MakeExpert
) -> Path:
    """Two experts, one that cannot be read, a ranking, an output, scores, a comparison, a plot, and a broken file."""
    folder = tmp_path_factory.mktemp("report") / "work & play"
    for seed, name in enumerate(("a", EVIL)):
        make_expert(folder / "experts" / name, vit_base, parity_task, seed=seed)
    broken = shutil.copytree(folder / "experts" / "a", folder / "experts" / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    sha256 = open_expert(folder / "experts" / "a").sha256
    ranking = Ranking(
        target=Target(name="a", path="experts/a", sha256=sha256),
        measure="combined",
        k=1,
        selected=[EVIL],
        why="because <script>alert(2)</script>",
        candidates=[
            Candidate(name=name, path=name, sha256="0", score=score, low=score - 0.1, high=score + 0.1, gain=score)
            for name, score in SCORES.items()
        ],
        not_comparable=[NotComparable(name="d", reason="its base is another")],
    )
    write_json(folder / "ranking.json", ranking.model_dump())
    manifest = {
        "command": "tune",
        "options": {"method": "learned", "target": "a", "seed": 3},
        "device": "cpu",
        "versions": {},
        "inputs": [{"name": "b", "sha256": "0"}, {"name": EVIL, "sha256": "1"}],
        "outputs": {},
        "results": {"train_examples": 1234, "train_loss": 0.5, "held_out_loss": None, "truncation": 0.25},
    }
    coefficients = {
        "method": "learned",
        "granularity": "matrix",
        "experts": ["b", "c"],
        "sha256": ["0", "1"],
        "experts_trained": False,
        "weights": {"q": [0.25, 0.75], "v": [0.75, 0.25], "w": [0.5, 0.5]},
    }
    tuned = folder / "tuned"
    tuned.mkdir()
    write_json(tuned / "pimerge.json", manifest)
    write_json(tuned / "coefficients.json", coefficients)
    (tuned / "README.md").write_text("# A card\n</pre><script>alert(3)</script>\n")
    interval = Interval(0.75, 0.5, 1.0)
    score = Score(EVIL, 0.75, 0.5, 1.0, 0.5, 0.25, 0.75, 12, "", {"accuracy": interval})
    from dataclasses import asdict

    write_json(folder / "scores.json", {"target": "a", "split": "test", "scores": [asdict(score)]})
    (folder / "comparison.json").write_text(json_text(comparison(["head", "learned"]).model_dump()))
    write_json(folder / "gain.json", {"figure": "gain"})
    (folder / "gain.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(4)</script></svg>'
    )
    (folder / "half.json").write_text("{")
    return folder
