"""Who helps whom in a pool: the gain of every expert for every other's task, measured and kept in the store."""

from __future__ import annotations

from collections.abc import Mapping

from pimerge.adapters.expert import Expert
from pimerge.embedding.features import FeatureReader, TargetFeatures
from pimerge.embedding.store_schema import MeasuredGains
from pimerge.models.linear_probe import held_out_log_probabilities


def measure_gains(reader: FeatureReader, experts: Mapping[str, Expert]) -> MeasuredGains:
    """Gains in accuracy over the bare base on a target's examples, at every scale of every expert.

    The head is a linear probe, and every example is answered by one that has not seen it
    (:func:`pimerge.models.linear_probe.held_out_log_probabilities`); the folds are the same for all.

    Args:
        experts: name → expert, the target's own left out.

    Raises:
        PimergeError: if no class has two examples, or an expert gives no finite features.
    """
    base = held_out_accuracy(reader.base_features())
    sources = {
        name: (
            expert.sha256,
            {str(scale): held_out_accuracy(sample) - base for scale, sample in reader.features(expert).items()},
        )
        for name, expert in experts.items()
    }
    return MeasuredGains(task_sha256=reader.task.sha256(), examples=len(reader.labels), sources=sources)


def held_out_accuracy(sample: TargetFeatures) -> float:
    """The share of right answers among the examples that can be held out."""
    found = held_out_log_probabilities(sample.vectors, sample.labels, sample.classes)
    asked = found.isfinite().all(1)
    return float((found.argmax(1) == sample.labels)[asked].double().mean())
