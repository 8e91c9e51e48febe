"""The family of file formats: the keys that a tool writes ↔ updates of modules, one file in ``formats/`` per format.

A format is found by its keys, never by a file's name. Reading keeps the names of modules and records the place of each
in the file (:class:`Place`), so that a merge of files of one format writes that format again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pimerge.adapters.lora_module import LoraModule
from pimerge.checkpoints.safetensors_file import TensorFile
from pimerge.core.plugins import Family, Strategy


@dataclass(frozen=True)
class Ending:
    """How a tool names the tensors of a module: the endings of their keys after the module's name.

    Attributes:
        slots: slot (``A``, ``B``, ``mid``, ``bias``) → ending.
        transposed: whether the file holds Aᵀ (d_in × r) and Bᵀ (r × d_out).
    """

    name: str
    slots: Mapping[str, str]
    transposed: bool = False


@dataclass(frozen=True)
class Place:
    """The place of a module in a file.

    Attributes:
        stem: its keys without their endings.
        ending: how its factors are named, and will be when it is written.
        whole: the slot that holds its update itself, not factors: ``diff``, ``w_norm`` or ``diff_b``; else empty.
        product: ``hada`` or ``lokr`` for a module of LoHa or LoKr, else empty.
        bias: the slot that holds the update of its bias, ``diff_b``, ``b_norm`` or ``bias``; empty without one.
        has_alpha: whether the file states its alpha.
        rows: the rows of each part of a module whose rows are split between several pairs of factors; else empty.
        stack: the stem under which the file stacks its factors with those of a mixture's other experts; else empty.
    """

    stem: str
    ending: Ending
    whole: str = ""
    product: str = ""
    bias: str = ""
    has_alpha: bool = False
    rows: tuple[int, ...] = ()
    stack: str = ""


@dataclass(frozen=True)
class KeySummary:
    """What tells a format: the stems, endings and slots of a file's keys.

    Attributes:
        keys: all keys.
        stems: the keys without their endings, for the keys with a known ending.
        endings: the names of the endings of factors.
        slots: the slots of all other endings, such as ``alpha`` and ``lokr_w1``.
        has_config: whether a config of PEFT is known.
    """

    keys: Sequence[str]
    stems: frozenset[str]
    endings: frozenset[str]
    slots: frozenset[str]
    has_config: bool


@dataclass(frozen=True)
class Content:
    """What a format reads from a file.

    Attributes:
        config: the fields of PEFT's config that the file states.
        file: its tensors under the keys that PEFT would give them; without its alphas.
        modules: name → update; None if the kind in the config says how to read the tensors.
        places: name → place in the file.
    """

    config: dict[str, Any]
    file: TensorFile
    modules: Mapping[str, LoraModule] | None = None
    places: Mapping[str, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class ForWriting:
    """What the metadata and the config of a merged file are made from.

    Attributes:
        ranks: name → rank, of each module that is written as factors.
        alphas: name → alpha, of the same modules.
        layouts: name → layout of each module.
        places: name → place in the file.
        metadata: the metadata of each source.
        configs: the config beside each source.
    """

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    layouts: Mapping[str, LoraModule]
    places: Mapping[str, Place]
    metadata: Sequence[Mapping[str, str]]
    configs: Sequence[Mapping[str, Any]]


LOAD_FILE = """
from safetensors.torch import load_file

tensors = load_file({path})
"""


def _no_metadata(writing: ForWriting) -> dict[str, str]:
    return {}


def _no_documents(writing: ForWriting) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Format(Strategy):
    """A file format of adapters.

    Attributes:
        tool: the tools that write it.
        keys: an example of its keys.
        rule: how a module is scaled, with the function that defines it.
        naming: formats that name modules alike can be merged with each other.
        flat: name of a module → its flattened name, by which it is matched in files of other formats; None for formats
            whose names are never flattened.
        named: flattened name, names in a file, flattened names of all modules → its name in such a file; empty if no
            rule tells it.
        holds_products: whether files hold LoHa, LoKr and full updates beside LoRA.
        recognises: whether a file has this format, by its keys.
        read: file, config beside it → content; raises every problem by name.
        needs_config: whether the scalings are in a config beside the file, so that a result is a folder.
        ending: the endings of a merged module whose update was computed.
        writes_alpha: whether a merged file states the alpha of every module; otherwise alpha is the rank.
        one_rank: whether a merged file pads factors to one rank, since its readers assume one.
        one_era: whether its readers expect the keys of one era in a file; then a mixture gets those of today.
        group: name of a module → the part of the model whose ranks or alphas must agree.
        metadata: the ``__metadata__`` of a merged file.
        documents: name → content of JSON files beside a merged file.
        file_name: name of the file in a folder; empty for the name of the first source.
        loading: Python code that loads a result from its folder, with places for ``file`` and ``base``.
        base: metadata → the base model, as far as the file tells; empty if it does not.
    """

    tool: str
    keys: str
    rule: str
    naming: str
    recognises: Callable[[KeySummary], bool]
    read: Callable[[TensorFile, Mapping[str, Any] | None], Content]
    needs_config: bool = False
    ending: Ending | None = None
    writes_alpha: bool = False
    one_rank: bool = False
    one_era: bool = False
    flat: Callable[[str], str] | None = None
    named: Callable[[str, Collection[str], Collection[str]], str] = lambda name, like, others: ""
    holds_products: bool = False
    group: Callable[[str], str] = lambda name: ""
    metadata: Callable[[ForWriting], dict[str, str]] = _no_metadata
    documents: Callable[[ForWriting], dict[str, Any]] = _no_documents
    file_name: str = ""
    loading: str = LOAD_FILE
    base: Callable[[Mapping[str, str]], str] = lambda metadata: ""


FORMATS = Family("pimerge.adapters.formats", "format", "FORMAT", Format)
"""The formats, asked in the order of their names: the first that recognises a file reads it."""
PEFT = "peft"
"""The name of PEFT's own format."""


def shown_kind(kind: str, format_name: str) -> str:
    """The kind of an expert for tables, with its format if it is not PEFT's.

    >>> shown_kind("lora", "kohya"), shown_kind("lora", "peft")
    ('lora (kohya)', 'lora')
    """
    return kind if format_name == PEFT else f"{kind} ({format_name})"
