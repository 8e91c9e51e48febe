"""The names of a base's modules, and the name today's transformers gives to a module of any earlier version."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

_PRIVATE_WRAPPER = re.compile(r"_\w*(?:mod|module|model)")
_PUBLIC_WRAPPERS = frozenset(("module", "engine", "wrapped_module", "wrapped_model"))
_TEXT = "language_model"
_HEADED = frozenset(("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS"))
_LAYER_OF_EXPERT = re.compile(r"(?P<owner>.+\.experts)(?P<rest>\.\d+\..+)")
_NO_PREFIX = frozenset((_TEXT, "base_model"))


def is_private_wrapper(part: str) -> bool:
    """Whether a part of a name is that of a wrapper: torch.compile, FSDP, activation checkpointing, Lightning and such.

    >>> [is_private_wrapper(part) for part in ("_orig_mod", "_fsdp_wrapped_module", "_ddp_module", "module", "model")]
    [True, True, True, False, False]
    """
    return _PRIVATE_WRAPPER.fullmatch(part) is not None


def is_wrapper(part: str) -> bool:
    """Whether a part of a name is that of any wrapper, also the ``module`` of DDP and DeepSpeed."""
    return part in _PUBLIC_WRAPPERS or is_private_wrapper(part)


def _unchanged(name: str) -> str:
    return name


@dataclass(frozen=True)
class ClassNames:
    """The names of a base's modules in the model classes that load it or a part of it.

    Attributes:
        headed: in classes that hold the backbone under its prefix.
        plain: in the backbone's own class and in those without a prefix.
    """

    headed: frozenset[str] = frozenset()
    plain: frozenset[str] = frozenset()


@dataclass(frozen=True)
class BaseModules:
    """The modules of a base; see :func:`pimerge.checkpoints.known_modules.known_modules`.

    Attributes:
        modules: their names, in the model that ``config.json`` describes or, if transformers does not know it, in the
            file.
        prefix: the backbone's name in a model with a head, such as ``bert``; empty if there is none.
        rename: name of a module in any version of transformers → name today.
        origin: name today → name in the first version.
        other_classes: the names in other classes; asked only for names that this class does not have.
    """

    modules: frozenset[str]
    prefix: str = ""
    rename: Callable[[str], str] = _unchanged
    origin: Callable[[str], str] = _unchanged
    other_classes: Callable[[], ClassNames] = ClassNames

    def place(self, name: str, task_type: str | None = None) -> str | None:
        """The name of a module today, in the model class that an adapter was trained on.

        A model class with a head has the backbone's prefix (``model.layers.0``), the backbone alone has not
        (``layers.0``). A name without it belongs to the backbone alone unless the task type says otherwise.

        Args:
            name: its name in the adapter.
            task_type: the ``task_type`` of the adapter.

        Returns:
            None if the base has no such module.
        """
        if self._is_today_s(name, is_headed=task_type in _HEADED):
            return name
        for way in _ways(name):
            if (found := self._found(way)) is not None:
                return self._in_class(way, found, task_type in _HEADED)
        if match := _LAYER_OF_EXPERT.fullmatch(name):  # which transformers now stacks into one parameter
            owner = self.place(match["owner"], task_type)
            return None if owner is None else owner + match["rest"]
        return None

    def has(self, name: str) -> bool:
        """Whether any class that loads the base, or its file, has a module of this name today."""
        if match := _LAYER_OF_EXPERT.fullmatch(name):
            return self.has(match["owner"])
        ways = (f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}."))
        return self._is_today_s(name, is_headed=False) or not self.modules.isdisjoint(ways)

    def place_all(self, names: Iterable[str], task_type: str | None = None) -> dict[str, str | None]:
        """Name → its name today, or None, for the modules of one adapter, which are all of one class.

        Without a task type, an adapter of any module that only the class with the head names so is of that class.
        """
        found = {name: self.place(name, task_type) for name in names}
        if task_type not in _HEADED and not self.modules.isdisjoint(found.values()):
            return {name: self.place(name, "CAUSAL_LM") for name in found}
        return found

    def _is_today_s(self, name: str, *, is_headed: bool) -> bool:
        """Whether a module has this name in a class that the adapter can be trained on."""
        if name in self.modules:
            return True
        classes = self.other_classes()
        return name in classes.headed or (
            name in classes.plain and not (is_headed and f"{self.prefix}.{name}" in self.modules)
        )

    def _found(self, name: str) -> str | None:
        for known in dict.fromkeys((name, self.rename(name))):
            for way in (known, f"{self.prefix}.{known}", known.removeprefix(f"{self.prefix}.")):
                if way in self.modules:
                    return way
        first, _, rest = name.partition(".")
        return rest if rest in self.modules and first not in _NO_PREFIX and not is_wrapper(first) else None

    def _in_class(self, name: str, found: str, is_headed: bool) -> str:
        if found == name:
            return name
        start = f"{self.prefix}."
        first, _, rest = name.partition(".")
        if found == rest and first not in _NO_PREFIX and self.rename(name) != found:
            # only the base's file lacks the prefix, unless it is there twice
            return rest if rest.startswith(f"{first}.") else name
        inner = found.removeprefix(start)
        if name.startswith(start):
            return start + inner
        if inner == found or is_headed:
            return found
        is_inner = name == inner or self.origin(found).startswith(start)
        return inner if is_inner else found


def _ways(name: str) -> Iterator[str]:
    """A name, and the name without the part that holds the language model in a multimodal model.

    The reverse is not tried: on a multimodal base, a name without that part belongs to the text model's own class.
    """
    yield name
    parts = name.split(".")
    if _TEXT in parts:
        yield ".".join(part for part in parts if part != _TEXT)
