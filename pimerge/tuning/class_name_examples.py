"""Use the names of a task's classes as further examples of text classification, one per class.

A class name describes its class; with few labels, it is worth several labelled examples.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError
from pimerge.models.linear_probe import PENALTY, fit_probe
from pimerge.tasks.examples import Examples, Rows
from pimerge.tuning.probe_head import class_layer, read_vectors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pimerge.models.loaded_base import LoadedBase
    from pimerge.tasks.task import Task

MOST = 500
"""Maximum number of examples on which the names are tested."""
_WORD = re.compile(r"[^\W\d_]{2,}")


def class_texts(task: Task) -> list[str]:
    """The name of each class as a text; empty if the task does not classify single texts, or names carry no meaning.

    Names carry no meaning if one is a number, some differ only by numbers, or most have no word of two letters.

    >>> from pathlib import Path
    >>> from pimerge.tasks.task import Task
    >>> from pimerge.tasks.schema import TaskFile
    >>> file = TaskFile(type="text-classification", data="d.jsonl", labels=["text-mode", "daemon"])
    >>> class_texts(Task(Path("task.json"), file))
    ['text mode', 'daemon']
    >>> class_texts(Task(Path("task.json"), file.model_copy(update={"labels": ["class 0", "class 1"]})))
    []
    """
    if set(task.columns) != {task.type.class_name_role, "label"}:
        return []
    bare = [re.sub(r"[-_\s\d]+", "", label) for label in task.labels]
    worded = sum(bool(_WORD.search(label)) for label in task.labels)
    if not all(bare) or len(set(bare)) < len(bare) or 2 * worded < len(bare):
        return []
    return [re.sub(r"[-_\s]+", " ", label).strip() for label in task.labels]


def class_names(task: Task, processor: Any, config: PreTrainedConfig) -> Examples:
    """Encode the names of the classes like the task's texts, labelled with their classes."""
    import datasets

    texts = class_texts(task)
    if not texts:
        raise PimergeError(
            f"the classes of '{task.path}' have no names that are texts like its examples",
            "leave --class-names out: it is for text-classification of single texts into classes named by words",
        )
    table = datasets.Dataset.from_dict({task.columns[task.type.class_name_role]: texts})
    numbers = range(len(texts))
    rows = Rows(table, task.columns, numbers, numbers, f"the names of the classes of '{task.path}'")
    encoded: Examples = task.type.encode(rows, task.file, processor, config)
    return encoded


def names_predict(loaded: LoadedBase, task: Task, examples: Examples) -> bool:
    """Whether a probe of the bare base's features, fitted on the names alone, predicts the examples.

    It does if the mean of p(y_i|x_i) over the examples (at most :data:`MOST`, evenly spaced) is above 1/C.

    Args:
        loaded: the base with a head for the task.
    """
    found = class_layer(loaded, task)
    if found is None:
        return False
    names, labels = read_vectors(loaded.model, task, found, class_names(task, loaded.processor, loaded.config))
    step = -(-len(examples) // MOST)
    vectors, truth = read_vectors(loaded.model, task, found, examples.subset(range(0, len(examples), step)))
    probe = fit_probe(names, labels, len(labels), PENALTY)
    right = probe.log_probabilities(vectors).exp().gather(1, truth[:, None])
    return float(right.mean()) > 1 / len(labels)
