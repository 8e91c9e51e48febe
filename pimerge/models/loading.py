"""Base model (and expert) → a torch module on a device, for one task."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pimerge.adapters.additive_tensors import sum_of
from pimerge.adapters.base_fit import check_fits, skeleton
from pimerge.adapters.compatibility import require_alike
from pimerge.adapters.expert import Expert
from pimerge.adapters.keys import PREFIX, PROMPT_PREFIX
from pimerge.adapters.lora_module import Factors, rank_fields, stored
from pimerge.checkpoints.architecture import heads_of, hidden_size
from pimerge.checkpoints.base import Base
from pimerge.core.errors import PimergeError, Problems
from pimerge.tasks.task import Task
from pimerge.tasks.types import for_base

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base model for one task.

    Attributes:
        model: in eval mode, nothing in it requires a gradient.
        processor: tokenizer or image processor.
        head: names of the modules that a task trains besides its expert: those outside the backbone, and
            any other that the checkpoint has no weights for; none where the base answers in text.
        has_own_head: whether the checkpoint holds a head for just these labels, or answers in text.
        drawn: names of the head's parameters that the checkpoint has no values for: they were drawn by the seed.
    """

    model: nn.Module
    processor: Any
    head: tuple[str, ...]
    has_own_head: bool
    drawn: frozenset[str] = frozenset()

    @property
    def config(self) -> Any:
        """The model's config, of transformers."""
        return self.model.config

    @property
    def width(self) -> int | None:
        """Numbers that a layer hands to the next, the hidden size; None where the config has no such."""
        return hidden_size(self.model)

    def config_for(self, experts: Sequence[Expert]) -> Any:
        """The config with room for what the experts put before a text."""
        taken = max((expert.positions for expert in experts), default=0)
        positions = getattr(self.config, "max_position_embeddings", None)
        if not taken or positions is None:
            return self.config
        found = copy(self.config)
        found.max_position_embeddings = positions - taken
        return found

    def head_parameters(self) -> list[nn.Parameter]:
        """What a task trains besides its expert."""
        return [parameter for name, parameter in self.model.named_parameters() if in_head(name, self.head)]

    def head_tensors(self) -> dict[str, Tensor]:
        """The head's parameters and buffers by their names in the base model."""
        state = self.model.state_dict()
        return {name: value for name, value in state.items() if in_head(name, self.head)}


def most_virtual_tokens(experts: Sequence[Expert]) -> int:
    """How many vectors some expert puts before a text; a batch of such must not be padded.

    A causal model looks for the last token that is no padding among the tokens, which it does not see behind vectors.
    """
    return max((expert.virtual_tokens for expert in experts), default=0)


def in_head(name: str, head: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to one of the head's modules.

    >>> in_head("classifier.weight", ("classifier",)), in_head("vit.layers.0.weight", ("classifier",))
    (True, False)
    """
    return any(name.startswith(module + ".") for module in head)


def resolve_device(device: str) -> torch.device:
    """``auto`` is the first GPU if there is one, else the CPU.

    Raises:
        PimergeError: if the device is not there.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise PimergeError(f"the device '{device}' cannot be used: {reason}", "try --device cpu") from error
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on the CPU.

    Raises:
        PimergeError: for a name that is not known.

    >>> resolve_dtype("auto", torch.device("cpu"))
    torch.float32
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise PimergeError(f"dtype is '{dtype}'", f"expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_base(base: Base, task: Task, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LoadedBase:
    """Load a base model, with a head for the task's labels where it trains one; remote code is never run.

    Args:
        seed: of weights that the checkpoint does not hold, such as the head.

    Raises:
        PimergeError: if the base cannot be loaded for this type of task.
    """
    import transformers

    where = "a folder" if base.folder else f"the Hub id, revision {base.revision or 'main'}"
    trains_head: bool = task.type.TRAINS_HEAD
    torch.manual_seed(seed)
    try:
        config = transformers.AutoConfig.from_pretrained(base.source, revision=base.revision, trust_remote_code=False)
        model, info = getattr(transformers, for_base(task.type.AUTO_MODEL, config)).from_pretrained(
            base.source,
            revision=base.revision,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            **(_classes(task.labels) if trains_head else {}),
        )
        processor = task.type.load_processor(base.source, base.revision)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        hint = "check the base's folder or Hub id, or pass --base"
        if "trust_remote_code" in str(error):
            hint = "it needs code of its own, which pimerge never runs: choose a base that transformers knows"
        if needed := re.search(r"requires the (\S+) library", str(error)):  # such as Qwen2-VL's processor of videos
            reason, hint = f"it {needed[0]}", f"install {needed[1].lower()} (pip install {needed[1].lower()})"
        raise PimergeError(
            f"the base model '{base.name}' ({where}) cannot be loaded for {task.file.type}: {reason}", hint
        ) from error
    padding = getattr(getattr(processor, "tokenizer", processor), "pad_token_id", None)
    if padding is not None and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = padding
    missing = set(info["missing_keys"])
    if missing and not trains_head:
        raise PimergeError(
            f"the base model '{base.name}' has no weights for {', '.join(sorted(missing)[:5])}, "
            f"so it cannot answer in text ({task.file.type})",
            "take a base that was trained as a language model",
        )
    head = _head_modules(model, missing) if trains_head else ()
    stray = sorted(key for key, *_ in info["mismatched_keys"] if not in_head(key, head))
    if stray:
        raise PimergeError(
            f"the base model '{base.name}' does not fit its own config: {', '.join(stray[:5])}",
            "download or save the base again",
        )
    replaced = missing | {key for key, *_ in info["mismatched_keys"]}
    own_labels = getattr(config, "id2label", {})
    has_own_head = not trains_head or (
        not any(in_head(key, head) for key in replaced) and list(own_labels.values()) == task.labels
    )
    if not trains_head:
        for part in (model.config, model.config.get_text_config()):
            part.use_cache = False  # only generation has a use for it, and asks for it
    model.requires_grad_(False)
    drawn = frozenset(key for key in replaced if in_head(key, head))
    return LoadedBase(model.to(device).eval(), processor, head, has_own_head, drawn)


def _classes(labels: Sequence[str]) -> dict[str, Any]:
    """What a config says of a head's classes."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: index for index, name in enumerate(labels)},
    }


class Bases:
    """Loads a base once for as long as consecutive experts need the same one.

    Attributes:
        checked: forms of expert for which the fast Fisher was compared with the loop in this run.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.checked: set[tuple[object, ...]] = set()
        self._key: tuple[str, str, int] | None = None
        self._loaded: LoadedBase | None = None

    def load(self, base: Base, task: Task) -> LoadedBase:
        """The base with a head of as many labels as the task has; see :func:`load_base`."""
        key = (base.identity, task.file.type, len(task.labels) if task.type.TRAINS_HEAD else 0)
        if self._loaded is None or self._key != key:
            self._loaded = None  # two bases are never held at once
            self._loaded = load_base(base, task, self.device, self.dtype)
            self._key = key
        return self._loaded


@contextmanager
def plugged_in(expert: Expert, loaded: LoadedBase) -> Iterator[nn.Module]:
    """PEFT's model of a base with an expert and its head, in eval mode; afterwards the base is as it was.

    Raises:
        PimergeError: if a module or a shape does not fit the base.
    """
    from peft import PeftModel

    from pimerge import peft_methods  # noqa: F401  PEFT has to know every kind

    check_fits(expert, loaded.model)
    with as_before(loaded.model):
        yield PeftModel.from_pretrained(loaded.model, str(expert.path)).eval()


def peft_prefix(model: nn.Module) -> str:
    """What PEFT's model puts before the names of the base's modules; nothing for a plain model."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return ""
    return PROMPT_PREFIX if model.active_peft_config.is_prompt_learning else PREFIX


@contextmanager
def plugged_in_sum(experts: Sequence[Expert], weights: Sequence[float], loaded: LoadedBase) -> Iterator[nn.Module]:
    """PEFT's model of W0 + Σ w_n ΔW_n under the base's own head, in eval mode; afterwards the base is as it was.

    Experts without ΔW are summed number by number, see :mod:`pimerge.adapters.additive_tensors`.

    Args:
        experts: each at its own scale.
        weights: one for each.

    Raises:
        PimergeError: if a module or a shape does not fit the base, or the experts do not fit each other.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    for expert in experts:
        check_fits(expert, loaded.model, head=False)
    require_alike(experts)
    if experts[0].tensor_sets:
        tensors = sum_of(experts, weights, loaded.model.get_parameter)
        with as_before(loaded.model):
            adapted = with_adapter(experts[0], loaded.model)
            key_of = experts[0].strategy.key_of_parameter
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if key_of(name) in tensors:
                        parameter.copy_(tensors[key_of(name)])
            yield adapted
        return
    with as_before(loaded.model):
        model: Any = None
        names = [f"expert{index}" for index in range(len(experts))]
        strength = {}
        for name, expert, weight in zip(names, experts, weights, strict=True):
            config, tensors, scale = _as_lora(expert)
            strength[name] = weight * scale
            config.modules_to_save = config.task_type = None  # a task type brings modules to save of its own
            config.inference_mode = True
            if model is None:
                model = PeftModel(loaded.model, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
            set_peft_model_state_dict(model, tensors, adapter_name=name)
        model.base_model.set_adapter(names)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling.update({name: strength[name] * value for name, value in layer.scaling.items()})
        yield model.eval()


def _as_lora(expert: Expert) -> tuple[PeftConfig, dict[str, Tensor], float]:
    """PEFT's config and tensors of an expert's update as a LoRA, and the strength that is not in them."""
    from peft import LoraConfig, PeftConfig

    if not expert.is_computed:
        keys = expert.file.entries.keys() - set(expert.head.values())
        tensors = {key: expert.tensor(key) for key in sorted(keys)}
        return PeftConfig.from_pretrained(str(expert.path)), tensors, expert.strength
    ranks = {name: module.rank for name, module in expert.modules.items()}
    config = LoraConfig(**rank_fields(ranks), fan_in_fan_out=bool(expert.config.get("fan_in_fan_out")))
    tensors = {}
    for name, module in expert.modules.items():
        factors = expert.factors(name)
        plain = Factors(factors.A.float(), (factors.scaling * factors.B).float(), 1.0)
        tensors |= stored(module, plain)
    return config, tensors, 1.0


def with_adapter(expert: Expert, base_model: nn.Module) -> nn.Module:
    """PEFT's model of a base with a fresh adapter of the form of an expert, in eval mode, under the base's own head."""
    from peft import PeftConfig, PeftModel, get_peft_model

    from pimerge import peft_methods  # noqa: F401  PEFT has to know every kind

    config = PeftConfig.from_pretrained(str(expert.path))
    config.inference_mode = True
    model: nn.Module
    if config.is_prompt_learning:  # what its task type does is what puts the prompt in
        model = get_peft_model(base_model, config)
    else:
        config.modules_to_save = config.task_type = None  # a task type brings modules to save of its own
        model = PeftModel(base_model, config)
    return model.eval()


@contextmanager
def as_before(base_model: nn.Module) -> Iterator[None]:
    """Take out whatever PEFT put into a base during the block."""
    before, attributes = dict(base_model.named_modules()), set(vars(base_model))
    try:
        yield
    finally:
        for name in vars(base_model).keys() - attributes:  # PEFT notes its adapters there, and takes them up again
            delattr(base_model, name)
        for name, module in before.items():  # PEFT's unload would leave an expert's head in place of the base's
            if base_model.get_submodule(name) is not module:
                base_model.set_submodule(name, module)
        base_model.requires_grad_(False)


@contextmanager
def as_they_were(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give parameters and buffers their values and dtypes back after the block, frozen and without gradients."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in before:
            tensor.requires_grad_(False)
            tensor.grad = None
            tensor.data = value


@contextmanager
def head_of_size(loaded: LoadedBase, base: Base, task: Task, labels: int) -> Iterator[None]:
    """The base with a head of zeros for so many labels; afterwards it has its own again.

    Args:
        task: of the type that the base was loaded for.
    """
    bare = skeleton(base.source, base.revision, task.type.AUTO_MODEL, labels)
    parameter = next(loaded.model.parameters())
    before = {name: loaded.model.get_submodule(name) for name in loaded.head}
    try:
        for name in loaded.head:
            empty = deepcopy(bare.get_submodule(name)).to_empty(device=parameter.device).to(parameter.dtype)
            empty.requires_grad_(False)
            for tensor in (*empty.parameters(), *empty.buffers()):
                tensor.zero_()
            loaded.model.set_submodule(name, empty.eval())
        yield
    finally:
        for name, module in before.items():
            loaded.model.set_submodule(name, module)


def set_head(model: nn.Module, head: Mapping[str, Tensor]) -> None:
    """Copy a head into a model, PEFT's or plain.

    Raises:
        PimergeError: if a tensor has no place in the model, or another shape.
    """
    places = {}
    prefix = peft_prefix(model)
    for name, parameter in model.named_parameters():
        plain = name.removeprefix(prefix)
        if ".original_module." not in name:
            places[plain.replace(".modules_to_save.default.", ".")] = parameter
    problems = Problems()
    for name, value in head.items():
        if name not in places:
            problems.add(f"the base model has no '{name}' for the head")
        elif places[name].shape != value.shape:
            problems.add(f"the head's '{name}' is {tuple(value.shape)}, the model's {tuple(places[name].shape)}")
    problems.raise_any("the head does not fit the model")
    with torch.no_grad():
        for name, value in head.items():
            places[name].copy_(value)


def draw_head(loaded: LoadedBase, seed: int) -> None:
    """Draw anew what the checkpoint has no values for, as :func:`load_base` draws it by this seed."""
    model: Any = loaded.model
    for key in loaded.drawn:
        marked = [model.get_parameter_or_buffer(key)]
        while key:
            key = key.rpartition(".")[0]
            marked.append(model.get_submodule(key))  # some models draw their head where they hold it
        for each in marked:
            vars(each).pop("_is_hf_initialized", None)  # transformers draws what has no mark
    torch.manual_seed(seed)
    model.initialize_weights()


def _head_modules(model: nn.Module, missing: set[str]) -> tuple[str, ...]:
    """The modules outside the backbone, and those whose weights the checkpoint lacks."""
    names = heads_of(model)
    for key in sorted(missing):
        module = key.rpartition(".")[0]
        if module and not in_head(key, tuple(names)):
            names.append(module)
    return tuple(names)
