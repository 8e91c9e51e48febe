"""The result of a merge, and the documents that are written with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from pimerge.adapters.head import Head
from pimerge.adapters.model_card import Source, card, licence_of
from pimerge.adapters.writer import Coefficients
from pimerge.core.errors import PimergeError
from pimerge.core.files import relative_to, sha256_files
from pimerge.core.hf_loading import load_adapter
from pimerge.core.manifest import (
    Hashed,
    Manifest,
    inputs_of,
    library_versions,
    raise_if_done,
    refuse_foreign,
    request_hash,
)
from pimerge.merging.choice import ChosenExperts
from pimerge.merging.method import OpenedMethod
from pimerge.merging.request import MergeRequest

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

    from pimerge.adapters.expert import Expert

SUFFIX = ".safetensors"
Weights = Mapping[str, Sequence[float]]
"""Name of a module, tensor set or tensor → one weight per expert."""
FOLDER_LOADING = """
from transformers import AutoModel  # or the Auto class of your task

model = AutoModel.from_pretrained("path/to/this/folder")
"""
FILE_LOADING = """
from safetensors.torch import load_file

tensors = load_file({})
"""


@dataclass
class Merged(ABC):
    """A checked merge, which is computed module by module when it is saved or loaded.

    Attributes:
        request: the arguments of the merge.
        method: the merge method with its options.
        path: folder of the saved result; None before it is saved.
        results: JSON document of the saved result; empty before it is saved.
        is_adapter: whether the result is an adapter; otherwise it is a full checkpoint.
    """

    is_adapter: ClassVar[bool] = True
    request: MergeRequest
    method: OpenedMethod
    path: Path | None = field(default=None, init=False)
    results: dict[str, Any] = field(default_factory=dict, init=False)

    @property
    def writes_file(self) -> bool:
        """Whether the result can be a single file: an output that ends in ``.safetensors`` is then no folder."""
        return False

    @property
    def file_output(self) -> Path | None:
        """The output if it is a single file."""
        output = self.request.output
        return output if self.writes_file and output is not None and output.suffix == SUFFIX else None

    def require_output_fits(self) -> None:
        """Refuse the name of a file for a result that is a folder."""
        output = self.request.output
        if output is not None and output.suffix == SUFFIX and not self.writes_file:
            raise PimergeError(
                f"the output '{output}' is named like a file, but the result needs a config and is a folder",
                f"name a folder: --output {output.with_suffix('')}",
            )

    @property
    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """The JSON document of ``--dry-run``: the experts, how they are merged, memory and size."""

    @abstractmethod
    def _write(self) -> dict[str, Any]:
        """Write the result to ``request.output``, completely or not at all, and return the results."""

    @property
    @abstractmethod
    def _decisive(self) -> dict[str, Any]:
        """The inputs and settings that decide the result, beside the method's."""

    @cached_property
    def request_hash(self) -> str:
        """The hash of all that decides the result."""
        request = self.request
        return request_hash(
            command="merge",
            method=[self.method.name, self.method.options, self.method.seed],
            selection=[request.include, request.exclude, request.head, request.dtype],
            truncation=[request.rank, request.energy, request.space],
            fisher=sha256_files(list(request.fisher)),
            **self._decisive,
        )

    @abstractmethod
    def refuse_over_inputs(self) -> None:
        """Refuse an output that is an input of the merge or contains one."""

    def check(self) -> None:  # noqa: B027  most merges have nothing to add
        """Run the checks that take time, and report special cases."""

    def save(self, output: str | Path, *, force: bool = False) -> Path:
        """Compute the merge and write it to a new folder, completely or not at all.

        Args:
            force: overwrite an existing folder; an input of the merge is never overwritten.
        """
        self.request = replace(self.request, output=Path(output), force=force)
        self.require_output_fits()
        self.refuse_over_inputs()
        if not force:
            raise_if_done(Path(output), self.request_hash)
        refuse_foreign(Path(output))
        self.results = self._write()
        self.path = Path(output)
        return self.path

    def load(self, base_model: nn.Module) -> PeftModel:
        """Load the merged adapter into a base model that was loaded with transformers."""
        if not self.is_adapter:
            raise PimergeError(
                "a full checkpoint is not an adapter",
                "save it, then load it with transformers: AutoModel.from_pretrained(FOLDER)",
            )
        if self.path is not None:
            return load_adapter(base_model, self.path)
        before = self.request
        with TemporaryDirectory() as folder:
            self.request = replace(before, output=Path(folder) / "merged")
            try:
                self._write()
                return load_adapter(base_model, self.request.folder)
            finally:
                self.request = before

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON document: the results if the merge has been saved, otherwise the plan."""
        return self.results or self.plan

    @property
    def _heading(self) -> dict[str, Any]:
        """The first fields of the JSON documents."""
        output = self.request.output
        return {"output": None if output is None else str(output), "method": self.method.name}

    def _manifest(
        self, inputs: Sequence[Hashed], weights: Weights, results: Mapping[str, Any], **more: Any
    ) -> Manifest:
        """Return the content of ``pimerge.json``, without the hashes of the output files."""
        request = self.request
        options = {
            "method": self.method.name,
            **self.method.options,
            "weights": flat(weights) or {name: list(values) for name, values in weights.items()},
            "seed": self.method.seed,
            "include": list(request.include),
            "exclude": list(request.exclude),
            "head": request.head,
            "dtype": request.dtype,
            **more,
        }
        return Manifest(
            command="merge",
            options=options,
            device="cpu",
            versions=library_versions(),
            inputs=inputs_of(inputs),
            outputs={},
            results=dict(results),
            request=self.request_hash,
        )

    def _card(
        self,
        base: str,
        sources: Sequence[Source],
        truncation: str,
        loading: str,
        kind: str | None = None,
        **more: Any,
    ) -> str:
        """Return the content of ``README.md``.

        Args:
            truncation: a sentence on the truncation error.
            loading: Python code that loads the result.
            kind: kind of the adapter; None for a full checkpoint.
            more: settings to list with the method's options.
        """
        method = self.method.strategy
        summary = f"{method.summary.removesuffix('.')}: {method.formula} ({method.paper})."
        options = {**self.method.options, **more, "seed": self.method.seed}
        return card(base, sources, method.name, summary, options, truncation, loading, kind)


@dataclass
class MergedExperts(Merged):
    """Merged adapters.

    Attributes:
        chosen: the experts before equal ones are joined, with the target's own.
        head: the task head of the result.
    """

    chosen: ChosenExperts
    head: Head

    def refuse_over_inputs(self) -> None:
        """Refuse an output that is an expert of the merge or contains one."""
        self.chosen.refuse_over(self.request.output)

    @property
    def _decisive(self) -> dict[str, Any]:
        task = self.head.task
        return {
            "experts": [(each.sha256, each.config_sha256, each.strength) for each in self.chosen.experts],
            "names": [each.name for each in self.chosen.experts],
            "weights": self.chosen.weights,
            "target": self.chosen.target and self.chosen.target.sha256,
            "task": task and task.file.model_dump(mode="json"),
            "bases": [each.base.identity if each.is_computed else each.base.name for each in self.chosen.experts],
        }

    def _coefficients(self, experts: Sequence[Expert], weights: Weights) -> Coefficients:
        """Return the content of ``coefficients.json``."""
        return Coefficients(
            method=self.method.name,
            granularity="matrix" if flat(weights) is None else "global",
            experts=[relative_to(expert.path, self.request.folder) for expert in experts],
            sha256=[expert.sha256 for expert in experts],
            scales=[expert.strength for expert in experts],
            experts_trained=False,
            weights={name: list(values) for name, values in weights.items()},
        )


def sources_of(experts: Sequence[Expert], weights: Weights) -> list[Source]:
    """Return the experts for the model card."""
    return [
        Source(expert.name, expert.sha256, _licence(expert), range_text(weights, place), expert.strength)
        for place, expert in enumerate(experts)
    ]


def _licence(expert: Expert) -> str:
    """The licence that the file itself states, or else the card in its folder."""
    return expert.file.metadata.get("modelspec.license") or licence_of(expert.folder)


def range_text(weights: Weights, place: int) -> str:
    """Format the weight of an expert, or its range over the modules."""
    values = sorted({row[place] for row in weights.values()})
    return f"{values[0]:.3f}" if len(values) == 1 else f"{values[0]:.3f} to {values[-1]:.3f}"


def flat(weights: Weights) -> list[float] | None:
    """Return the weights if they are the same in every module, otherwise None."""
    rows = {tuple(row) for row in weights.values()}
    return list(rows.pop()) if len(rows) == 1 else None
