"""One expert: a PEFT adapter folder, its tensors read when they are asked for."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pimerge.adapters import unhandled
from pimerge.adapters.kind import KINDS, AdapterHeader, Kind, Parts
from pimerge.adapters.lora_module import Factors, LoraModule
from pimerge.adapters.tensor_sets import TensorSet
from pimerge.checkpoints.base import Base, find_base, is_hub_id
from pimerge.checkpoints.safetensors_file import FLOATS, TensorFile, is_finite, open_tensors
from pimerge.core.errors import PimergeError, Problems
from pimerge.core.files import read_json, sha256_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TASK = "task.json"
_HUB_FILES = (CONFIG, WEIGHTS, TASK, "pimerge.json")
_CARD = "README.md"  # for its licence
_ONLINE = "run it once with the network and without HF_HUB_OFFLINE, so that it is downloaded"
_FLOATS = frozenset(FLOATS)
_INTEGERS = frozenset(("I64", "I32", "I16", "I8", "U8", "BOOL"))  # buffers of a head, such as BatchNorm's count
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
_HUB_REFERENCE = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Expert:
    """A PEFT adapter folder that has been checked; see :func:`open_expert`.

    Attributes:
        path: its folder.
        kind: the name of a file in ``kinds/``; of one that is only looked at, PEFT's name for it.
        config: the content of ``adapter_config.json``.
        file: its tensors.
        modules: name of each adapted module → its update ΔW; empty for a kind that has none.
        tensor_sets: name → tensors that are combined number by number, for the other kinds.
        head: parameter name in the base model → key, for each tensor of ``modules_to_save``.
        dtypes: the dtypes of its tensors without the head's, as safetensors names them.
        base_override: the base given by option in place of the one that the config names.
        strength: factor of its update; its modules' scalings have it already.
        unhandled: why it can be looked at, but not embedded, ranked, merged or tuned; empty if it can.
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

    @property
    def name(self) -> str:
        """Its folder's name; of the Hub's local cache, where folders are commits, the repository's name."""
        folder = self.path.resolve()
        return folder.parents[1].name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name

    @property
    def strategy(self) -> Kind:
        """What its kind says of its tensors; there is none for one that is only looked at."""
        return KINDS.load(self.kind)

    @cached_property
    def base(self) -> Base:
        """The base model it belongs to."""
        return _base(self.path, self.config, self.base_override)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of its tensors' file."""
        return sha256_file(self.path / WEIGHTS)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks of its modules, ascending."""
        return tuple(sorted({module.rank for module in self.modules.values()}))

    @property
    def parameters(self) -> int:
        """Numbers in its factors or tensor sets, the head not counted."""
        shared = {key for module in self.modules.values() for key in module.shared_keys}
        return (
            sum(module.numbers for module in self.modules.values())
            + sum(math.prod(self.file.entries[key].shape) for key in shared)
            + sum(group.numbers for group in self.tensor_sets.values())
        )

    @property
    def parts(self) -> list[str]:
        """The names of its modules or tensor sets, in order: what has a weight of its own."""
        return list(self.modules or self.tensor_sets)

    @property
    def keys(self) -> list[str]:
        """The keys of its tensors without the head's, in alphabetical order."""
        factors = {key for module in self.modules.values() for key in module.keys}
        return sorted(factors | {slot.key for group in self.tensor_sets.values() for slot in group.slots.values()})

    @property
    def has_strength(self) -> bool:
        """Whether another strength than 1 means anything: there is an expert like it that changes nothing."""
        return all(any(slot.has_neutral for slot in group.slots.values()) for group in self.tensor_sets.values())

    @property
    def positions(self) -> int:
        """How many positions before a text it takes."""
        return int(self.config["num_virtual_tokens"]) if self.strategy.before_text else 0

    @property
    def virtual_tokens(self) -> int:
        """How many vectors it puts before a text."""
        return int(self.config["num_virtual_tokens"]) if self.strategy.embeds_tokens else 0

    @property
    def is_computed(self) -> bool:
        """Whether its updates ΔW are computed from tensors of another form than LoRA's."""
        return any(module.is_computed for module in self.modules.values())

    def with_strength(self, strength: float) -> Expert:
        """The same expert at another strength: strength · ΔW in every module; strengths multiply over calls.

        Raises:
            PimergeError: if its kind has but one strength.
        """
        if strength == 1:
            return self
        if not self.has_strength:
            raise PimergeError(
                f"'{self.name}' is of kind {self.kind}, which has one strength, and {strength:g} was asked for",
                "set its strength to 1",
            )
        modules = {name: replace(module, scaling=strength * module.scaling) for name, module in self.modules.items()}
        return replace(self, modules=modules, strength=strength * self.strength)

    def tensor(self, key: str) -> Tensor:
        """Read one tensor."""
        return self.file.read(key)

    def factors(self, module: str) -> Factors:
        """Read the update of one module: A (r × d_in), B (d_out × r), scaling, bias."""
        return self.modules[module].factors(self.tensor)

    def updates(self, modules: Iterable[str]) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Read the updates of several modules at once: name → A (r × d_in) and scaling · Bᵀ (r × d_out) in float64."""
        import numpy as np

        chosen = {name: self.modules[name] for name in modules}
        stored = {name: module for name, module in chosen.items() if not module.is_computed}
        read = self.file.arrays(key for module in stored.values() for key in (module.A, module.B))
        found = {
            name: (
                read[module.A].reshape(module.rank, -1).astype(np.float64),
                np.multiply(read[module.B].reshape(module.d_out, -1), module.scaling, dtype=np.float64).T,
            )
            for name, module in stored.items()
        }
        for name in (name for name in chosen if name not in stored):
            factors = self.factors(name)
            found[name] = factors.A.numpy(), (factors.scaling * factors.B).numpy().T
        return found

    def head_tensors(self) -> dict[str, Tensor]:
        """Read the task head: parameter name in the base model → tensor."""
        return {name: self.tensor(key) for name, key in self.head.items()}

    def require_finite(self) -> None:
        """Check every tensor for NaN and Inf.

        Raises:
            PimergeError: naming each tensor that holds one.
        """
        problems = Problems()
        for key in self.file.entries:
            tensor = self.tensor(key)
            if not is_finite(tensor):
                bad = int((~tensor.isfinite()).sum())
                problems.add(
                    f"{key} holds {bad} values that are NaN or Inf",
                    "the training diverged; train it again with a lower learning rate",
                )
        problems.raise_any("NaN or Inf weights")

    def require_handled(self) -> None:
        """Refuse an expert that can only be looked at.

        Raises:
            PimergeError: saying why.
        """
        if self.unhandled:
            kinds = KINDS.names()
            known = "download it first (hf download NAME), or pass --base with its folder"
            raise PimergeError(
                f"'{self.name}' is of PEFT's kind {self.kind}, which is only looked at: {self.unhandled}",
                known if self.kind in kinds else f"pimerge combines the kinds: {', '.join(kinds)}",
            )


def open_expert(
    reference: str | Path, base: str | None = None, *, convert: bool = False, only_look: bool = False
) -> Expert:
    """Open an expert and check its files.

    Args:
        reference: a folder, or a Hub id (``org/name`` or ``org/name@revision``).
        base: a base model's folder or Hub id, in place of the one that the expert names.
        convert: accept what has to be converted with the base's weights (DoRA, PiSSA, OLoRA).
        only_look: accept kinds of PEFT's that cannot be combined, and those that cannot without a base that is not
            there, too; they say why in ``unhandled``.

    Raises:
        PimergeError: with every problem of its files: missing or truncated safetensors, a pickle, JSON that
            does not fit, a kind that is not handled, shapes that do not fit each other.
    """
    path = _folder(reference)
    problems = Problems()
    config: Any = {}
    with problems.collected():
        config = read_json(path / CONFIG)
        if not isinstance(config, dict):
            raise PimergeError(f"'{path / CONFIG}' is no JSON object", "save the adapter again with PEFT")
    file = None
    with problems.collected():
        file = _tensors(path)
    if not problems.found and file is not None:
        with problems.collected():
            expert = _checked(path, config, file, base, convert, only_look)
            if not only_look:
                expert.require_handled()
            return expert
    problems.raise_any(f"the expert '{path}' has several problems")
    raise AssertionError("unreachable: a problem was raised")


def find_experts(pool: Path) -> list[Path]:
    """The experts of a pool: each folder in it that holds an adapter, or the folder itself if it is one.

    Raises:
        PimergeError: if the folder is not there or holds no expert.
    """
    if not pool.is_dir():
        raise PimergeError(f"there is no folder '{pool}'", "name the folder that holds the experts")
    if _looks_like_expert(pool):
        return [pool]
    found = sorted(child for child in pool.iterdir() if not child.name.startswith(".") and _looks_like_expert(child))
    if not found and any(pool.glob("*.safetensors")):
        raise PimergeError(
            f"'{pool}' holds plain state dicts and no expert",
            f"those need no store: pimerge rank --target {pool}/NAME.safetensors, pimerge merge FILE FILE",
        )
    if not found:
        raise PimergeError(
            f"'{pool}' holds no expert",
            f"expected folders with {CONFIG} and {WEIGHTS}, as PEFT's save_pretrained writes them",
        )
    return found


def is_hub_reference(reference: str) -> bool:
    """Whether a reference can be a Hub id; a folder of that name goes first.

    >>> is_hub_reference("org/adapter@main"), is_hub_reference("./experts/a")
    (True, False)
    """
    match = _HUB_REFERENCE.fullmatch(reference)
    return match is not None and is_hub_id(match["id"])


def _looks_like_expert(folder: Path) -> bool:
    names = (CONFIG, WEIGHTS, *_PICKLES[:3])
    return folder.is_dir() and any((folder / name).exists() for name in names)


def _folder(reference: str | Path) -> Path:
    path = Path(reference)
    if os.path.isdir(path):  # unlike Path's, False for a name that no disk takes
        if not _looks_like_expert(path):
            inside = [str(each) for each in sorted(path.iterdir()) if _looks_like_expert(each)]
            raise PimergeError(
                f"'{path}' is no expert: it has no {CONFIG} and no {WEIGHTS}",
                f"name one of those in it: {', '.join(inside[:5])}" if inside else "",
            )
        return path
    if os.path.exists(path):
        raise PimergeError(f"'{path}' is a file, expected the folder of an expert")
    if isinstance(reference, str) and is_hub_reference(reference):
        return _download(reference)
    raise PimergeError(f"there is no expert '{reference}'", "expected a folder or a Hub id (org/name@revision)")


def _download(reference: str) -> Path:
    """The snapshot of a Hub id in the local cache, downloaded if need be."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]  # httpx's, or httpx2's

    match = _HUB_REFERENCE.fullmatch(reference)
    assert match
    download = partial(snapshot_download, match["id"], revision=match["revision"])
    try:
        path = Path(download(allow_patterns=[*_HUB_FILES, _CARD]))
    except (NetworkError, HFValidationError, OSError) as error:
        found = None
        if isinstance(error, LocalEntryNotFoundError):
            with suppress(LocalEntryNotFoundError):  # that the cache lacks no more than the card is no reason to stop
                found = download(allow_patterns=list(_HUB_FILES), local_files_only=True)
        if found is None:
            reason, hint = _why_no_download(error, match["id"], match["revision"])
            raise PimergeError(
                f"'{reference}' is no folder here and cannot be had from the Hub: {reason}", hint
            ) from error
        path = Path(found)
    missing = " and no ".join(name for name in (CONFIG, WEIGHTS) if not (path / name).is_file())
    if missing and constants.HF_HUB_OFFLINE:
        raise PimergeError(f"the Hub's local cache has no {missing} of '{reference}'", _ONLINE)
    if missing:
        raise PimergeError(
            f"'{reference}' is no adapter: its repository on the Hub has no {missing}",
            "expected what PEFT's save_pretrained writes, as safetensors; a pickle (adapter_model.bin) is not read",
        )
    return path


def _why_no_download(error: Exception, name: str, revision: str | None) -> tuple[str, str]:
    """What went wrong with a download, and what to do about it."""
    from huggingface_hub import errors

    # behind "not in the local cache" stands why the Hub itself was of no help
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    page = f"https://huggingface.co/{name}"
    if isinstance(cause, errors.GatedRepoError):
        return "the repository is gated", f"accept its terms at {page}, then log in with 'hf auth login'"
    if isinstance(cause, errors.RepositoryNotFoundError):  # the Hub tells a stranger no more than that
        return (
            "there is no such repository, or it is private",
            f"check the name '{name}'; if it is private, log in with 'hf auth login' as someone who may read it",
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"the repository has no revision '{revision or 'main'}'", f"see {page}/tree/main for its branches"
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return "it is not in the local cache, or not whole, and HF_HUB_OFFLINE is set", _ONLINE
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        hint = "log in again with 'hf auth login'" if status in (401, 403) else "try again later"
        return f"the Hub answers with status {status}", hint
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the Hub cannot be reached, and it is not in the local cache, or not whole", "check the network"
    return str(error).strip().partition("\n")[0], "check the name, the network and the disk"


def _tensors(path: Path) -> TensorFile:
    """The expert's tensors; only the header is read."""
    file = path / WEIGHTS
    if file.is_file():
        return open_tensors(file)
    pickle = next((name for name in _PICKLES if (path / name).is_file()), None)
    if pickle:
        raise PimergeError(
            f"'{path / pickle}' is a pickle, which can run code when it is read; only {WEIGHTS} is read",
            "load it with PEFT where you trust it, and save it again: model.save_pretrained(FOLDER)",
        )
    raise PimergeError(f"'{file}' is not there", "save the adapter with PEFT: model.save_pretrained(FOLDER)")


def _checked(
    path: Path, config: dict[str, Any], file: TensorFile, base: str | None, convert: bool, only_look: bool
) -> Expert:
    """The expert of a config and tensors that fit each other."""
    kind, reason = _kind(config)
    shapes = tuple((key, entry.shape) for key, entry in file.entries.items())
    strategy = None if reason else KINDS.load(kind)
    parts: Mapping[str, LoraModule | TensorSet] = {}
    head: dict[str, str] = {}
    if strategy is not None and strategy.reads_base:
        try:
            parts, head = _parsed_with_base(strategy, path, config, dict(shapes), base, convert)
        except PimergeError as error:
            if not only_look or _base(path, config, base).folder is not None:
                raise
            reason = error.problems[0].message
    if not parts:
        parts, head = _parsed("" if reason else kind, json.dumps(config), shapes, convert)
    modules = {name: part for name, part in parts.items() if isinstance(part, LoraModule)}
    tensor_sets = {name: part for name, part in parts.items() if isinstance(part, TensorSet)}
    expert = Expert(path, kind, config, file, modules, head, (), base, tensor_sets=tensor_sets, unhandled=reason)
    if not only_look:
        _require_same_base(expert)
    dtypes = {key: entry.dtype for key, entry in file.entries.items()}
    biases = {module.bias for module in modules.values() if module.bias}
    used = {dtypes[key] for key in expert.keys}
    other = used - _FLOATS | {dtypes[key] for key in head.values()} - _FLOATS - _INTEGERS
    if other and not reason:
        raise PimergeError(
            f"it holds tensors stored as {', '.join(sorted(other))}",
            "expected F16, BF16, F32 or F64: save the adapter in one of these",
        )
    return replace(expert, dtypes=tuple(sorted({dtypes[key] for key in expert.keys if key not in biases})))


def _require_same_base(expert: Expert) -> None:
    """Check the copies of the base's weights that PEFT saves beside the factors of its embeddings.

    Raises:
        PimergeError: if one is not the base's weight as stored, or the base is not there to compare.
    """
    copies = {name: module for name, module in expert.modules.items() if module.base_copy}
    if not copies:
        return
    from pimerge.adapters.base_weights import base_weights  # it reads experts

    hint = (
        "save it with model.save_pretrained(FOLDER, save_embedding_layers=False) if the embeddings are the base's own"
    )
    problems = Problems()
    fan_in_fan_out = bool(expert.config.get("fan_in_fan_out"))
    try:
        weight_of = base_weights(expert.base, copies, fan_in_fan_out=fan_in_fan_out)
    except PimergeError as error:
        found = error.problems[0].message
        raise PimergeError(f"it holds a copy of the base's weight of {', '.join(copies)}: {found}", hint) from error
    for name, module in copies.items():
        copy, weight = expert.tensor(str(module.base_copy)), weight_of(name)
        weight = weight.T if module.layer == "embedding" else weight
        if copy.shape != weight.shape or not copy.to(weight.dtype).equal(weight):
            problems.add(f"{module.base_copy} is not the weight of the base '{expert.base.name}'", hint)
    problems.raise_any("it holds other weights than its base")


@lru_cache(maxsize=32)
def _parsed(kind: str, config: str, shapes: tuple[tuple[str, tuple[int, ...]], ...], convert: bool) -> Parts:
    """The parts and the head of an expert, not to be changed; most experts of a pool have the same.

    Args:
        kind: empty for one that is only looked at.
    """
    header = AdapterHeader(json.loads(config), dict(shapes), convert)
    return KINDS.load(kind).parse(header) if kind else unhandled.parse(header)


def _parsed_with_base(
    kind: Kind, path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], base: str | None, convert: bool
) -> Parts:
    """The same for a kind whose layout depends on the shapes of the base's layers."""

    def layers(modules: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
        from pimerge.adapters.base_weights import layer_shapes  # imports torch, which other kinds need not

        return layer_shapes(_base(path, config, base), modules, fan_in_fan_out=bool(config.get("fan_in_fan_out")))

    return kind.parse(AdapterHeader(config, shapes, convert, layers))


def _base(path: Path, config: dict[str, Any], override: str | None) -> Base:
    """The base of an expert at a path, or the one given in its place."""
    if override:
        name, _, revision = override.partition("@")
        return find_base(name, revision or None, Path.cwd())
    return find_base(config.get("base_model_name_or_path"), config.get("revision"), path)


def _kind(config: dict[str, Any]) -> tuple[str, str]:
    """The kind that a config says, and why it is only looked at; empty if it is not."""
    peft_type = str(config.get("peft_type"))
    kind = next((kind.name for kind in KINDS if kind.peft_type == peft_type), None)
    if kind is not None:
        return kind, ""
    if reason := unhandled.why_unhandled(peft_type):
        return peft_type.lower(), reason
    raise PimergeError(
        f"its peft_type is '{peft_type}', which is not handled",
        f"pimerge reads the kinds: {', '.join(KINDS.names())}",
    )
