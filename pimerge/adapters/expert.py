"""One expert: a PEFT adapter folder whose tensors are read on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pimerge.adapters.bare_parameter import with_order
from pimerge.adapters.base_biases import trained_biases
from pimerge.adapters.expert_order import known_order
from pimerge.adapters.expert_parts import base_of, canonical, kind_of, parts_of, require_floats
from pimerge.adapters.format import PEFT, Place
from pimerge.adapters.fused_experts import fused
from pimerge.adapters.kind import KINDS, Kind
from pimerge.adapters.lora_module import Factors, LoraModule
from pimerge.adapters.saved_embeddings import without_copies
from pimerge.adapters.source import AdapterSource, open_source
from pimerge.adapters.tensor_sets import TensorSet
from pimerge.adapters.unhandled import what_to_do
from pimerge.checkpoints.base import Base
from pimerge.checkpoints.safetensors_file import TensorFile, is_finite
from pimerge.core.arguments import checked_arguments
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.files import json_text, sha256_bytes, sha256_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_USUAL_FILES = ("adapter_model", "adapters", "pytorch_lora_weights")  # names that tell nothing of the adapter


@dataclass(frozen=True)
class Expert:
    """An adapter that has been checked; see :func:`open_expert`.

    Attributes:
        path: its folder, or its file if it is a single file.
        kind: the name of its kind; PEFT's name for one that can only be inspected.
        config: the content of ``adapter_config.json``, or the fields of it that another format states, with the names
            that modules have here.
        file: its tensors, under the keys that PEFT writes today.
        modules: name of each adapted module → its update ΔW; empty for a kind without ΔW.
        tensor_sets: name → tensors that are combined elementwise, for the other kinds.
        head: parameter name in the base model → key, for each tensor of ``modules_to_save``.
        biases: parameter name in the base model → key, for each trained bias of the base (``bias="all"``).
        dtypes: safetensors' names of its tensors' dtypes, without the head's.
        base_override: the base given by option in place of the one that the config names.
        strength: factor of its update, which the scalings of its modules include.
        unhandled: why it can only be inspected, not embedded, ranked, merged or tuned; empty if it is handled.
        config_file: the file that its config was read from; None if its format has none.
        format: the name of its file format.
        places: name of each module → its place in the file, for formats other than PEFT's.
        label: its name among others with folders of the same name, such as ``run-1/checkpoint-500``.
        renamed: name of a module in its file → its name here, for those that differ.
    """

    path: Path
    kind: str
    config: dict[str, Any]
    file: TensorFile
    modules: dict[str, LoraModule]
    head: dict[str, str]
    dtypes: tuple[str, ...]
    base_override: str | None = None
    strength: float = 1.0
    tensor_sets: dict[str, TensorSet] = field(default_factory=dict)
    unhandled: str = ""
    config_file: Path | None = None
    format: str = PEFT
    places: Mapping[str, Place] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    label: str = ""

    @property
    def folder(self) -> Path:
        """The folder that holds its files, its task and its card."""
        return self.path.parent if self.path.suffix == ".safetensors" else self.path

    @property
    def name(self) -> str:
        """The name of its folder or file, or of its repository if it is a snapshot in the Hub's local cache."""
        if self.label:
            return self.label
        if self.folder != self.path and self.path.stem not in _USUAL_FILES:
            return self.path.stem
        folder = self.folder.resolve()
        return folder.parents[1].name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name

    @property
    def strategy(self) -> Kind:
        """Its kind; a kind that can only be inspected has none."""
        return KINDS.load(self.kind)

    @cached_property
    def base(self) -> Base:
        """The base model that it was trained on."""
        return base_of(self.folder, self.config, self.base_override)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file of its tensors."""
        return self.file.sha256

    @cached_property
    def config_sha256(self) -> str:
        """SHA-256 of its config; of a format without one, of what the file states in its place."""
        return (
            sha256_bytes(json_text(self.config).encode()) if self.config_file is None else sha256_file(self.config_file)
        )

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of its modules, ascending."""
        return tuple(sorted({module.rank for module in self.modules.values()}))

    @property
    def parameters(self) -> int:
        """The number of parameters in its factors or tensor sets, without the head."""
        shared = {key for module in self.modules.values() for key in module.shared_keys}
        return (
            sum(module.numbers for module in self.modules.values())
            + sum(math.prod(self.file.entries[key].shape) for key in shared)
            + sum(group.numbers for group in self.tensor_sets.values())
        )

    @property
    def parts(self) -> list[str]:
        """The names of its modules or tensor sets, each of which can have its own weight, in order."""
        return list(self.modules or self.tensor_sets)

    @property
    def keys(self) -> list[str]:
        """The keys of its tensors without the head, in alphabetical order."""
        factors = {key for module in self.modules.values() for key in module.keys}
        slots = (slot for group in self.tensor_sets.values() for slot in group.slots.values())
        return sorted(factors | {slot.key for slot in slots if slot.is_stored})

    @property
    def has_strength(self) -> bool:
        """Whether strengths other than 1 are defined, since it has a neutral point."""
        return all(any(slot.has_neutral for slot in group.slots.values()) for group in self.tensor_sets.values())

    @property
    def positions(self) -> int:
        """The number of positions that it takes before a text."""
        return int(self.config["num_virtual_tokens"]) if self.strategy.before_text else 0

    @property
    def virtual_tokens(self) -> int:
        """The number of vectors that it puts before the embedded text."""
        return int(self.config["num_virtual_tokens"]) if self.strategy.embeds_tokens else 0

    @property
    def is_computed(self) -> bool:
        """Whether its updates ΔW are computed from tensors in another format than LoRA's."""
        return any(module.is_computed for module in self.modules.values())

    def with_strength(self, strength: float) -> Expert:
        """The expert with its updates multiplied by a strength; strengths of several calls multiply."""
        if strength == 1:
            return self
        if not self.has_strength:
            raise PimergeError(
                f"'{self.name}' is of kind {self.kind}, which only has strength 1; got {strength:g}",
                "set its strength to 1",
            )
        modules = {name: replace(module, scaling=strength * module.scaling) for name, module in self.modules.items()}
        return replace(self, modules=modules, strength=strength * self.strength)

    def tensor(self, key: str) -> Tensor:
        """Read one tensor."""
        return self.file.read(key)

    def factors(self, module: str) -> Factors:
        """Read the update of one module: A (r × d_in), B (d_out × r), scaling, bias."""
        found = self.modules[module]
        return found.factors(self._recent if found.parameter else self.tensor)

    @cached_property
    def _recent(self) -> Callable[[str], Tensor]:
        """Reads tensors that several modules share; the last ones are kept."""
        return lru_cache(maxsize=4)(self.file.read)

    def updates(self, modules: Iterable[str]) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Read the updates of several modules at once: name → A (r × d_in) and scaling · Bᵀ (r × d_out) in float64."""
        import numpy as np

        chosen = {name: self.modules[name] for name in modules}
        stored = {name: module for name, module in chosen.items() if module.is_plain}
        read = self.file.arrays(key for module in stored.values() for key in (module.A, module.B))
        found = {}
        for name, module in chosen.items():
            if name in stored:
                B = np.multiply(read[module.B].reshape(module.d_out, -1), module.scaling, dtype=np.float64)
                found[name] = read[module.A].reshape(module.rank, -1).astype(np.float64), B.T
            else:
                factors = self.factors(name)
                found[name] = factors.A.double().numpy(), (factors.scaling * factors.B.double()).numpy().T
        return found

    def head_tensors(self) -> dict[str, Tensor]:
        """Read the task head: parameter name in the base model → tensor."""
        return {name: self.tensor(key) for name, key in self.head.items()}

    def require_finite(self) -> None:
        """Check every tensor for NaN and Inf."""
        problems = Problems()
        for key in self.file.entries:
            if not is_finite(tensor := self.tensor(key)):
                bad = int((~tensor.isfinite()).sum())
                problems.add(
                    f"{key} holds {bad} values that are NaN or Inf",
                    "the training diverged; train it again with a lower learning rate",
                )
        problems.raise_any("NaN or Inf weights")

    def require_handled(self) -> None:
        """Refuse an expert that can only be inspected."""
        if self.unhandled:
            known = "download it first (hf download NAME), or pass --base with its folder"
            raise PimergeError(
                f"'{self.name}' is of PEFT's kind {self.kind}, which can only be inspected: {self.unhandled}",
                known if self.kind in KINDS.names() else what_to_do(str(self.config.get("peft_type"))),
            )


@checked_arguments()
def open_expert(
    reference: str | Path,
    base: str | None = None,
    *,
    convert: bool = False,
    only_look: bool = False,
    expert_order: str | None = None,
    config: Path | None = None,
) -> Expert:
    """Open an expert and check its files.

    Args:
        reference: a folder, a safetensors file, or a Hub id (``org/name`` or ``org/name@revision``).
        base: a base model's folder or Hub id, in place of the one that the expert names.
        convert: accept what has to be converted with the base's weights (DoRA, PiSSA, OLoRA).
        only_look: also accept experts that can only be inspected, since their kind cannot be combined or needs a base
            that is not on this machine; ``unhandled`` says why.
        expert_order: how the updates of a mixture's experts are stored, if the config does not say.
        config: the ``adapter_config.json`` of a single file; None for the one beside it.
    """
    source = open_source(reference, config)
    order = known_order(source.config, source.file, expert_order)
    source = replace(source, config=with_order(source.config, order))
    problems = Problems()
    with problems.collected():
        expert = checked(source, base, convert=convert, only_look=only_look)
        if not only_look:
            expert.require_handled()
        return expert
    problems.raise_any(f"the expert '{source.path}' has several problems")
    raise AssertionError("unreachable: a problem was raised")


def checked(source: AdapterSource, base: str | None, *, convert: bool, only_look: bool) -> Expert:
    """Build the expert from its config and tensors, which must fit each other."""
    kind, reason = kind_of(source.config)
    strategy = None if reason else KINDS.load(kind)
    source, renamed = canonical(source, strategy, base)
    path, config, file = source.path, source.config, source.file
    parts, head, reason = parts_of(source, strategy, reason, base, convert, only_look)
    modules = {name: part for name, part in parts.items() if isinstance(part, LoraModule)}
    modules = fused(modules, lambda: base_of(path, config, base)) if source.modules is None else modules
    tensor_sets = {name: part for name, part in parts.items() if isinstance(part, TensorSet)}
    expert = Expert(path, kind, config, file, modules, head, (), base, tensor_sets=tensor_sets, unhandled=reason)
    if not only_look:
        head = without_copies(head, config.get("modules_to_save") or [], lambda: expert.base, expert.tensor)
        expert = replace(expert, head=head, biases=trained_biases(config, file, lambda: expert.base))
    dtypes = {key: entry.dtype for key, entry in file.entries.items()}
    biases = {module.bias for module in modules.values() if module.bias}
    if not reason:
        require_floats(
            [dtypes[key] for key in (*expert.keys, *expert.biases.values())], [dtypes[key] for key in head.values()]
        )
    return replace(
        expert,
        dtypes=tuple(sorted({dtypes[key] for key in expert.keys if key not in biases})),
        config_file=source.config_file,
        renamed=renamed,
        format=source.format,
        places=source.places,
    )
