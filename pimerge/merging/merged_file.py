"""Merge updates ΔW of files of another format than PEFT's, and write a file of that format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pimerge.adapters.file_writer import FileLayout, check_file, documents_beside, file_layout, write_file
from pimerge.adapters.format import Format
from pimerge.adapters.model_card import CARD_FILE
from pimerge.adapters.writer import COEFFICIENTS_FILE
from pimerge.core.errors import PimergeError
from pimerge.core.files import hashes_of, json_text, new_file, new_folder, write_into
from pimerge.core.manifest import MANIFEST_FILE
from pimerge.core.version import __version__
from pimerge.merging.choice import ChosenExperts
from pimerge.merging.merged import flat, range_text, sources_of
from pimerge.merging.merged_updates import MergedUpdates, merged_updates
from pimerge.merging.method import OpenedMethod
from pimerge.merging.request import MergeRequest

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


@dataclass
class MergedFile(MergedUpdates):
    """Merged updates ΔW, which are written as a file of the experts' format.

    Attributes:
        format: the format.
    """

    format: Format

    @property
    def writes_file(self) -> bool:
        """Whether the result can be a single file, without a config beside it."""
        return not self.format.needs_config

    @property
    def plan(self) -> dict[str, Any]:
        """The JSON document of ``--dry-run``."""
        return {**super().plan, "format": self.format.name}

    def load(self, base_model: nn.Module) -> PeftModel:
        """Refuse to load it with PEFT, which does not read this format."""
        raise PimergeError(
            f"the result has the format of {self.format.name}, which PEFT does not load",
            "save it, and load the file with the tool that wrote the experts",
        )

    @property
    def _layout(self) -> FileLayout:
        merge = self.merge
        return file_layout(self.format, merge.experts, merge.names, merge.dtype)

    def _write(self) -> dict[str, Any]:
        request, single = self.request, self.file_output
        if single is not None:
            with new_file(single, force=request.force) as partial:
                self._write_tensors(partial)
        else:
            with new_folder(request.folder, force=request.force) as partial:
                self._write_folder(partial)
        manifest = self._manifest_of_updates()
        return {
            **self._heading,
            **manifest.results,
            "format": self.format.name,
            "experts": [expert.name for expert in self.merge.experts],
            "weights": flat(self.merge.weights) or self.merge.weights,
        }

    def _write_tensors(self, path: Path) -> dict[str, Any]:
        """Write and check the file, and return the JSON files that belong beside it."""
        layout = self._layout
        self.summaries = write_file(path, layout, self._modules(), self._provenance)
        modules = {name: self.merge.layout(name) for name in self.merge.names}
        beside = documents_beside(layout, modules, self.summaries)
        check_file(path, layout, self.merge.names, next(iter(beside.values()), None))
        return beside

    def _write_folder(self, folder: Path) -> None:
        name = self.format.file_name or self.merge.experts[0].file.path.name
        beside = self._write_tensors(folder / name)
        coefficients = self._coefficients(self.merge.experts, self.weights)
        contents = {
            **{document: json_text(content) for document, content in beside.items()},
            COEFFICIENTS_FILE: json_text(coefficients.model_dump()),
            CARD_FILE: self._file_card(name),
        }
        write_into(folder, contents)
        manifest = self._manifest_of_updates(format=self.format.name)
        manifest = manifest.model_copy(update={"outputs": hashes_of(folder)})
        write_into(folder, {MANIFEST_FILE: json_text(manifest.model_dump())})

    @property
    def _provenance(self) -> dict[str, Any]:
        """What the metadata of the file says about how it was made."""
        merge = self.merge
        return {
            "version": __version__,
            "method": self.method.name,
            "options": self.method.options,
            "sources": [
                {"name": e.name, "sha256": e.sha256, "weight": range_text(merge.weights, place), "scale": e.strength}
                for place, e in enumerate(merge.experts)
            ],
        }

    def _file_card(self, name: str) -> str:
        base = self.merge.experts[0].base.name
        return self._card(
            base,
            sources_of(self.merge.experts, self.merge.weights),
            self._truncation_text,
            self.format.loading.format(
                file=json.dumps(name), path=json.dumps(f"path/to/this/folder/{name}"), base=json.dumps(base or "BASE")
            ),
            "lora",
            space=self.merge.space,
        )


def merged_file(request: MergeRequest, method: OpenedMethod, chosen: ChosenExperts, format_: Format) -> MergedFile:
    """Check a merge of experts whose result has another format than PEFT's."""
    merged = merged_updates(request, method, chosen)
    return MergedFile(request, method, chosen, merged.head, merged.merge, format_)
