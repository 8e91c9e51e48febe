"""PEFT's layers of an adapter around a base of zeros, and the ΔW that they compute.

The base's weights are a single expanded zero, so they take no memory for any size of base. The adapter's tensors are
loaded as PEFT loads them and then converted to float64. (On the meta device, PEFT would move the adapter there, and the
result would be empty.)
"""

from __future__ import annotations

import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import RLock
from typing import TYPE_CHECKING, Any

from pimerge.adapters.keys import PREFIX
from pimerge.core.errors import PimergeError, Problems

if TYPE_CHECKING:
    from torch import Tensor, nn

Read = Callable[[str], "Tensor"]
Shapes = Mapping[str, tuple[int, ...]]
Weights = tuple[tuple[str, tuple[int, ...]], ...]
_MOST_MODELS = 32
_LOCK = RLock()  # experts are opened in several threads, and PEFT uses the global random generator
# The exceptions that PEFT raises for an invalid config or invalid tensors.
_REFUSALS = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, ImportError, ArithmeticError, re.error)


def _get_delta_weight(layer: Any, weight: Tensor) -> Tensor:
    delta: Tensor = layer.get_delta_weight("default")
    return delta


def merged_delta(layer: Any, weight: Tensor) -> Tensor:
    """ΔW as what changes in the base's weight when PEFT merges the adapter into it, for kinds that multiply weights."""
    layer.merge()
    delta: Tensor = layer.get_base_layer().weight.data - weight
    return delta


@dataclass(frozen=True, kw_only=True)
class PeftDelta:
    """How PEFT computes the ΔW of a kind.

    Attributes:
        peft_type: PEFT's name of the kind.
        slots: prefix of the last component of the kind's keys, such as ``hada_``.
        delta: PEFT's layer and its base weight → ΔW, in the shape of the weight.
        rank: shapes by slot → upper bound of ΔW's rank; None if only the shape of ΔW limits it.
        weight: shapes by slot → shape of the base's weight; None if the shape has to be read from the base.
        needs_weight: config → whether ΔW depends on the base's weights.
        on_weight: whether PEFT's layer has to be created on the base's weight, since it starts from it or changes it.
        fixed: slots of tensors in the file that are not trained, such as indices.
        trained: slots of trained tensors that all layers share.
        require: raises if the file lacks a tensor without which its layers cannot be determined.
        since: the first version of PEFT that has the kind.
    """

    peft_type: str
    slots: str
    delta: Callable[[Any, Tensor], Tensor] = _get_delta_weight
    rank: Callable[[Shapes], int | None] = lambda shapes: None
    weight: Callable[[Shapes], tuple[int, ...]] | None = None
    needs_weight: Callable[[Mapping[str, Any]], bool] = lambda config: False
    on_weight: bool = False
    fixed: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    require: Callable[[Shapes], None] = lambda shapes: None
    since: str = "0.19"


@dataclass(frozen=True, eq=False)
class PeftLayers:
    """The layers of one adapter.

    Attributes:
        how: how PEFT computes the kind's ΔW.
        fields: fields of PEFT's config, as JSON.
        weights: name of each layer and shape of the base's weight, (d_out, d_in, *kernel), in the base's order.
        keys: the keys of all tensors to load.
    """

    how: PeftDelta
    fields: str
    weights: Weights
    keys: tuple[str, ...]

    def check(self, shapes: Shapes, problems: Problems) -> None:
        """Add a problem for every tensor that is missing, unexpected or of another shape than in PEFT's layers.

        Args:
            shapes: key → shape of each tensor in the file.
        """
        expected: Shapes = {}
        with problems.collected():
            expected = _expected(self.how.peft_type, self.fields, self.weights)
        if problems.found:
            return
        # PEFT's model repeats the shared tensors in every layer
        shared = tuple(f".{key.removeprefix('base_model.')}" for key in expected if not key.startswith(PREFIX))
        own = {key for key in expected if not key.startswith(PREFIX) or not key.endswith(shared or ("\0",))}
        for key in sorted(own | shapes.keys()):
            name = key.removeprefix(PREFIX)
            if key not in shapes:
                problems.add(f"it has no {name}, which PEFT's layers have", "save the adapter again")
            elif key not in expected:
                problems.add(f"it has {name}, which PEFT's layers do not have", "save the adapter again")
            elif shapes[key] != expected[key]:
                problems.add(
                    f"{name} is {shapes[key]}, expected {expected[key]}",
                    "adapter_config.json belongs to another adapter, or the expert to another base",
                )

    def dense(self, name: str, read: Read, weight: Tensor | None) -> Tensor:
        """ΔW of a layer, (d_out × d_in) in float64.

        Args:
            read: reads the tensor of a key.
            weight: the base's weight, for a kind whose ΔW depends on it.
        """
        import torch

        with _LOCK, torch.no_grad():
            on_weight = self.how.on_weight and weight is not None
            model = self._on_weight(name, read, weight) if on_weight and weight is not None else self._loaded(read)
            layer: Any = model.get_submodule(f"{PREFIX}{name}")
            base = layer.get_base_layer().weight
            delta = self.how.delta(layer, base if weight is None else weight.double().reshape(base.shape))
            return (delta.to_dense() if delta.is_sparse else delta).double().reshape(len(base), -1)

    def _on_weight(self, name: str, read: Read, weight: Tensor) -> nn.Module:
        """Create PEFT's model of one layer on the base's weight, which it may change, and load its tensors."""
        shape = dict(self.weights)[name]
        with _refusals(self.how.peft_type):
            model = _model(self.how.peft_type, self.fields, ((name, shape),), weight)
            own = [key for key in self.keys if key.startswith(f"{PREFIX}{name}.") or not key.startswith(PREFIX)]
            _load(model, {key: read(key) for key in own})
        base: Any = model.get_submodule(f"{PREFIX}{name}").get_base_layer()  # type: ignore[operator]
        base.weight.data = weight.double().reshape(shape).clone()
        return model

    def _loaded(self, read: Read) -> nn.Module:
        if self not in _LOADED:
            while len(_LOADED) >= _MOST_MODELS:
                _LOADED.popitem(last=False)
            model = _model(self.how.peft_type, self.fields, self.weights)
            _load(model, {key: read(key) for key in self.keys})
            _LOADED[self] = model
        return _LOADED[self]


_LOADED: OrderedDict[PeftLayers, nn.Module] = OrderedDict()  # in order of loading


@lru_cache(maxsize=_MOST_MODELS)
def _expected(peft_type: str, fields: str, weights: Weights) -> Shapes:
    """Key → shape of each tensor that PEFT would save."""
    from peft import get_peft_model_state_dict

    with _LOCK:
        found = get_peft_model_state_dict(_model(peft_type, fields, weights), save_embedding_layers=False)
    return {key: tuple(tensor.shape) for key, tensor in found.items()}


def _model(peft_type: str, fields: str, weights: Weights, weight: Tensor | None = None) -> nn.Module:
    """Create PEFT's model of these layers, with newly initialised adapters.

    Args:
        weight: the base's weight of the only layer; None for zeros.
    """
    import torch
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel

    names = [name for name, _ in weights]
    with _refusals(peft_type), torch.random.fork_rng(devices=[]):
        config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](target_modules=names, inference_mode=True, **json.loads(fields))
        layers = _zeros(weights)
        if weight is not None:
            ((name, shape),) = weights
            layers.get_submodule(name).weight.data = weight.float().reshape(shape)
        model: nn.Module = PeftModel(layers, config)
        return model.eval()


def _zeros(weights: Weights) -> nn.Module:
    """Create layers of these names whose weights are a single expanded zero."""
    import torch
    from torch import nn

    classes: list[Any] = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d]  # by the number of kernel dimensions
    root = nn.Module()
    for name, shape in sorted(weights, key=lambda each: each[0].count(".")):  # parents before their children
        d_out, d_in, *kernel = shape
        with torch.device("meta"):
            made = classes[len(kernel)](d_in, d_out, *([kernel] if kernel else []), bias=False)
        made.weight = nn.Parameter(torch.zeros([1] * len(shape)).expand(shape), requires_grad=False)
        *parents, last = name.split(".")
        owner = root
        for part in parents:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, made)
    return root


def _load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load an adapter's tensors as PEFT does, and convert all but the base's weights to float64."""
    from peft import set_peft_model_state_dict

    with _refusals("the adapter"):
        set_peft_model_state_dict(model, dict(tensors))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and ".base_layer." not in f".{name}":
            parameter.data = parameter.data.double()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module._buffers[name] = buffer.double()


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turn PEFT's exceptions into a PimergeError, and suppress its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except _REFUSALS as error:
            reason = str(error).strip().partition("\n")[0]
            raise PimergeError(
                f"PEFT cannot create its layers for {what}: {type(error).__name__}: {reason}",
                "check adapter_config.json, and that the adapter was trained on this base",
            ) from error
