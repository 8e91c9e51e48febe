"""Low-rank updates ΔW = s·B·A of Linear, Conv and Embedding layers (LoRA, arXiv 2106.09685).

Layout relied on by all that merge or compose: A is (r × d_in), B is (d_out × r), whatever the layer.
A convolution's kernel is folded into d_in; an embedding's A is (r × vocabulary). ``fan_in_fan_out``
(GPT-2's Conv1D) concerns how the base stores its weight, not the factors.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pimerge.adapters.kinds._keys import PREFIX, sort_keys
from pimerge.adapters.kinds._lora_config import DORA, OLORA, conversions_of, refuse_unhandled, well_typed
from pimerge.core.errors import PimergeError, Problems

if TYPE_CHECKING:
    from torch import Tensor

PEFT_TYPE = "LORA"
HAS_UPDATE = True

_FACTOR_KEY = re.compile(
    re.escape(PREFIX) + r"(?P<module>.+)\.(?:lora_(?P<factor>[AB])\.weight|lora_B\.(?P<bias>bias)"
    r"|lora_embedding_(?P<embedding>[AB])|lora_(?P<magnitude>magnitude)_vector(?:\.weight)?|(?P<base>base_layer)\.weight)"
)


@dataclass(frozen=True)
class LoraModule:
    """Where one module's update lies in the adapter file, and its scaling.

    Attributes:
        name: the module's full name in the base model.
        A, B, bias: keys of the tensors; ``bias`` is None without ``lora_bias``.
        scaling: s = alpha / r, or alpha / √r with rsLoRA.
        layer: ``linear``, ``embedding`` or ``conv``.
        shape_A, shape_B: shapes as stored.
        magnitude: key of DoRA's magnitudes; None without.
        conversions: what it has to be converted from with the base's weight: ``PiSSA``, ``OLoRA``, ``DoRA``.
        base_copy: key of a copy of the base's weight, which PEFT saves beside an embedding's factors; None without.
    """

    name: str
    A: str
    B: str
    bias: str | None
    rank: int
    alpha: float
    scaling: float
    layer: str
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    magnitude: str | None = None
    conversions: tuple[str, ...] = ()
    base_copy: str | None = None

    @property
    def full_rank(self) -> int:
        """The most that ΔW's rank can be, after its conversion."""
        if DORA in self.conversions:
            return min(self.d_out, self.d_in)
        return self.rank * 2 if self.conversions else self.rank

    @property
    def is_computed(self) -> bool:
        """Whether its factors are computed from other tensors, so that they are nobody's to compare or train."""
        return False

    @property
    def keys(self) -> tuple[str, ...]:
        """Of its tensors that are combined."""
        return tuple(key for key in (self.A, self.B, self.bias) if key)

    @property
    def numbers(self) -> int:
        """How many its factors hold."""
        return self.rank * (self.d_in + self.d_out)

    @property
    def d_in(self) -> int:
        """Inputs of ΔW, a convolution's kernel included."""
        return math.prod(self.shape_A[1:])

    @property
    def d_out(self) -> int:
        """Outputs of ΔW."""
        return self.shape_B[0]

    def factors(self, read: Callable[[str], Tensor]) -> Factors:
        """Its factors in the common layout; ``read`` gives the tensor of a key."""
        A, B = read(self.A), read(self.B)
        return Factors(
            A.reshape(A.shape[0], -1),
            B.reshape(B.shape[0], -1),
            self.scaling,
            read(self.bias) if self.bias else None,
        )


@dataclass(frozen=True)
class Factors:
    """One module's update ΔW = scaling · B A, and its bias update scaling · bias.

    Attributes:
        A: (r × d_in).
        B: (d_out × r).
        bias: (d_out) or None.
    """

    A: Tensor
    B: Tensor
    scaling: float
    bias: Tensor | None = None


def parse(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, convert: bool = False
) -> tuple[dict[str, LoraModule], dict[str, str]]:
    """Read the layout of a LoRA expert.

    Args:
        config: the content of ``adapter_config.json``.
        shapes: the shape of each tensor of ``adapter_model.safetensors``.
        convert: accept DoRA, PiSSA and OLoRA, whose modules then say what they have to be converted from.

    Returns:
        module name → its update, in alphabetical order; and the head's parameter name in the base model →
        its key (``modules_to_save``).

    Raises:
        PimergeError: with all that is wrong or cannot be handled, by name.

    >>> modules, head = parse({"r": 2, "lora_alpha": 4}, {
    ...     "base_model.model.q.lora_A.weight": (2, 8), "base_model.model.q.lora_B.weight": (6, 2)})
    >>> modules["q"].scaling, modules["q"].d_out, head
    (2.0, 6, {})
    """
    problems = Problems()
    config = well_typed(config, problems)
    refuse_unhandled(config, problems, convert=convert)
    keys, head = sort_keys(config, shapes, _slot_of, "LoRA factors", problems)
    modules = {}
    for name in sorted(keys):
        module = _module(name, keys[name], config, shapes, problems, convert=convert)
        if module is not None:
            modules[name] = module
    problems.raise_any("this LoRA cannot be used")
    return modules, head


def stored(module: LoraModule, merged: Factors) -> dict[str, Tensor]:
    """The tensors of one module as PEFT stores them: the inverse of :meth:`LoraModule.factors` for scaling 1."""
    rank = merged.A.shape[0]
    tensors = {
        module.A: merged.A.reshape(rank, *module.shape_A[1:]).contiguous(),
        module.B: merged.B.reshape(merged.B.shape[0], rank, *module.shape_B[2:]).contiguous(),
    }
    if merged.bias is not None:
        tensors[bias_key(module.name)] = merged.bias.contiguous()
    return tensors


def refuse_biased_embeddings(modules: Iterable[LoraModule], has_bias: bool) -> None:
    """Refuse an expert of these modules with biases (``lora_bias``) if one is an embedding.

    Raises:
        PimergeError: naming the embedding.
    """
    embeddings = [module.name for module in modules if module.layer == "embedding"]
    if has_bias and embeddings:
        raise PimergeError(
            f"an expert has biases (lora_bias), and '{embeddings[0]}' is an embedding: PEFT loads no expert with both",
            "leave out the experts with lora_bias or those that adapt embeddings",
        )


def rank_fields(ranks: Mapping[str, int]) -> dict[str, Any]:
    """What PEFT's config says of a LoRA of these modules and ranks, with scaling 1.

    >>> rank_fields({"q": 2, "v": 4, "k": 2})
    {'r': 2, 'lora_alpha': 2, 'rank_pattern': {'k': 2, 'q': 2, 'v': 4}, 'alpha_pattern': {'k': 2, 'q': 2, 'v': 4}, \
'target_modules': ['k', 'q', 'v']}
    """
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    # PEFT takes the first key that a module's name ends with, so longer names go first and all are listed.
    differ = len(set(ranks.values())) > 1
    pattern = {name: ranks[name] for name in sorted(ranks, key=lambda n: (-len(n), n))} if differ else {}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
    }


def bias_key(module: str) -> str:
    """The key of a module's bias update (``lora_bias``).

    >>> bias_key("q")
    'base_model.model.q.lora_B.bias'
    """
    return f"{PREFIX}{module}.lora_B.bias"


def key_of_parameter(name: str) -> str:
    """The adapter file's key for the name of a parameter of PEFT's model with adapter ``default``.

    >>> key_of_parameter("base_model.model.q.lora_A.default.weight")
    'base_model.model.q.lora_A.weight'
    """
    return re.sub(r"(\.lora_(?:embedding_)?[AB])\.default", r"\1", name)


def is_B_factor(key: str) -> bool:
    """Whether a key names the factor B, whose Fisher tells tasks apart best.

    >>> [is_B_factor(f"base_model.model.q.lora_{end}") for end in ("B.weight", "A.weight", "B.bias")]
    [True, False, False]
    """
    return key.endswith((".lora_B.weight", ".lora_embedding_B"))


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """What ``rank_pattern`` or ``alpha_pattern`` says of a module: the first key that matches its end.

    >>> pattern_value({"q_proj": 4}, "layers.0.q_proj", 8), pattern_value({"proj": 4}, "layers.0.q_proj", 8)
    (4, 8)
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _slot_of(key: str) -> tuple[str, str] | None:
    match = _FACTOR_KEY.fullmatch(key)
    if match is None:
        return None
    slots = ("factor", "embedding", "bias", "magnitude", "base")
    return match["module"], next(match[slot] for slot in slots if match[slot])


def _module(
    name: str,
    keys: Mapping[str, str],
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    problems: Problems,
    *,
    convert: bool,
) -> LoraModule | None:
    missing = {"A", "B"} - set(keys)
    if missing:
        problems.add(f"module '{name}' has no factor {' and '.join(sorted(missing))}", "save the adapter again")
        return None
    shape_A, shape_B = shapes[keys["A"]], shapes[keys["B"]]
    rank = shape_A[0] if shape_A else 0
    empty = 0 in (*shape_A, *shape_B)
    if len(shape_A) < 2 or len(shape_B) < 2 or empty or shape_B[1] != rank:
        problems.add(
            f"module '{name}': A is {shape_A} and B is {shape_B}, expected (r, d_in, …) and (d_out, r, …)",
            "a grouped convolution is not handled; otherwise save the adapter again",
        )
        return None
    stated = pattern_value(config.get("rank_pattern") or {}, name, config.get("r", rank))
    if stated != rank:
        problems.add(
            f"module '{name}': the tensors have rank {rank}, adapter_config.json says {stated}",
            "the config belongs to another adapter; save both together",
        )
    alpha = pattern_value(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    bias = keys.get("bias")
    if bias and shapes[bias] != shape_B[:1]:
        problems.add(f"module '{name}': lora_B.bias is {shapes[bias]}, expected {shape_B[:1]}")
    layer = "embedding" if "lora_embedding_" in keys["A"] else "conv" if len(shape_A) > 2 else "linear"
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    magnitude, conversions = keys.get("magnitude"), conversions_of(config)
    if magnitude and (DORA not in conversions or shapes[magnitude] != shape_B[:1]):
        problems.add(
            f"{magnitude} is {shapes[magnitude]}, and use_dora is {'on' if DORA in conversions else 'off'}",
            f"DoRA has one of {shape_B[:1]} in each module, others have none: save config and tensors together",
        )
    elif DORA in conversions and not magnitude and convert:
        problems.add(f"module '{name}' has no lora_magnitude_vector, and use_dora is on", "save the adapter again")
    if conversions and (layer != "linear" or (OLORA in conversions and config.get("fan_in_fan_out"))):
        problems.add(
            f"module '{name}': {' with '.join(conversions)} is converted for Linear layers only",
            "merge it into a base of its own with PEFT",
        )
    return LoraModule(
        name,
        keys["A"],
        keys["B"],
        bias,
        rank,
        float(alpha),
        scaling,
        layer,
        tuple(shape_A),
        tuple(shape_B),
        magnitude,
        conversions,
        keys.get("base_layer"),
    )
