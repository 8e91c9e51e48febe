"""Rank, merge and tune the PEFT adapters ("experts") of a pool for a new task with few labels.

Six functions follow each other. Each is what the command of the same name calls (``evaluate`` is ``pimerge eval``):

``embed``     computes the Fisher embedding of every expert of a pool
``rank``      finds the experts that help a target
``merge``     combines the selected experts without training
``tune``      combines them and trains the result on the target's examples
``evaluate``  scores experts on the target's test split, beside the bare base
``compare``   compares tune methods with controls over several samplings of few labels

``verify`` checks a merge that any program made against what it claims to be, and ``extract`` turns a full fine-tune
into an adapter. ``convert`` brings an adapter or a checkpoint to the files that these functions read.

In a folder that holds ``experts/``::

    import pimerge

    pimerge.embed("experts")
    ranking = pimerge.rank("X", k=2)
    merged = pimerge.merge(ranking, method="uniform")
    tuned = pimerge.tune(ranking, method="learned")
    for score in pimerge.evaluate([tuned, merged], ranking=ranking):
        print(score.name, score.accuracy)

Names are imported at their first use, so ``import pimerge`` itself loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pimerge.core.version import __version__

if TYPE_CHECKING:
    from pimerge.adapters.expert import Expert, open_expert
    from pimerge.adapters.ranking_document import Ranking
    from pimerge.core.errors import PimergeError
    from pimerge.embedding.embed import EmbedResult, embed
    from pimerge.evaluation.compare import compare
    from pimerge.evaluation.comparison import Comparison
    from pimerge.evaluation.evaluate import Evaluation, evaluate
    from pimerge.merging.convert import Converted, convert
    from pimerge.merging.extraction.extract import extract
    from pimerge.merging.extraction.extraction import Extraction
    from pimerge.merging.merge import merge
    from pimerge.merging.merged import Merged
    from pimerge.merging.verification.verification import Verification
    from pimerge.merging.verification.verify import verify
    from pimerge.ranking.rank import rank
    from pimerge.tasks.task import Task
    from pimerge.tuning.session import TuneResult
    from pimerge.tuning.tune import tune

__all__ = [
    "Comparison",
    "Converted",
    "EmbedResult",
    "Evaluation",
    "Expert",
    "Extraction",
    "Merged",
    "PimergeError",
    "Ranking",
    "Task",
    "TuneResult",
    "Verification",
    "__version__",
    "compare",
    "convert",
    "embed",
    "evaluate",
    "extract",
    "merge",
    "open_expert",
    "rank",
    "tune",
    "verify",
]

_MODULES = {
    "Comparison": "pimerge.evaluation.comparison",
    "Converted": "pimerge.merging.convert",
    "EmbedResult": "pimerge.embedding.embed",
    "Evaluation": "pimerge.evaluation.evaluate",
    "Expert": "pimerge.adapters.expert",
    "Extraction": "pimerge.merging.extraction.extraction",
    "Merged": "pimerge.merging.merged",
    "PimergeError": "pimerge.core.errors",
    "Ranking": "pimerge.adapters.ranking_document",
    "Task": "pimerge.tasks.task",
    "TuneResult": "pimerge.tuning.session",
    "Verification": "pimerge.merging.verification.verification",
    "compare": "pimerge.evaluation.compare",
    "convert": "pimerge.merging.convert",
    "embed": "pimerge.embedding.embed",
    "evaluate": "pimerge.evaluation.evaluate",
    "extract": "pimerge.merging.extraction.extract",
    "merge": "pimerge.merging.merge",
    "open_expert": "pimerge.adapters.expert",
    "rank": "pimerge.ranking.rank",
    "tune": "pimerge.tuning.tune",
    "verify": "pimerge.merging.verification.verify",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'pimerge' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
