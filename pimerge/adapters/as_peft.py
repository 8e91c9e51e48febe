"""Name the modules of an adapter in another file format as PEFT does, so that it can be written as a PEFT folder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from pimerge.adapters.expert import Expert
from pimerge.adapters.format import FORMATS, PEFT
from pimerge.adapters.lora_module import FLATTENED, LoraModule, bias_key, in_layer
from pimerge.checkpoints.base import Base
from pimerge.core.errors import PimergeError, Problems

_FLAT = re.compile(r"(?:lora_te\d?|lora_unet|lora|lycoris)_")
"""What programs put before a flattened name."""
_DIFFUSION = "an adapter of a diffusion model keeps its own format, which merge, inspect and rank read"


def as_peft(expert: Expert) -> Expert:
    """The same updates under the names of the base's modules, in PEFT's format.

    mlx-lm names modules as transformers does. Other formats flatten the names (``model_layers_0_…``), which only the
    base's own names can resolve; a name that stands for none or for several of its modules is refused.
    """
    shapes = _shapes(expert.base)
    if not shapes and not _has_own_names(expert):
        raise PimergeError(
            f"'{expert.name}' has the format of {expert.format}, whose names of modules are not those of PEFT",
            f"{_DIFFUSION}; for one of a model that transformers loads, pass --base with its folder",
        )
    names = in_base(expert.modules, shapes) if shapes else {name: name for name in expert.modules}
    modules: dict[str, LoraModule] = {}
    entries = dict(expert.file.entries)
    problems = Problems()
    if stacks := sorted({place.stack for place in expert.places.values()} - {""}):
        problems.add(
            f"it has updates of a mixture's experts in '{stacks[0]}', which PEFT names otherwise",
            "fuse it into its base with the tool that wrote it",
        )
    for old, module in sorted(expert.modules.items()):
        shape = shapes.get(names[old], ())
        if (shapes and len(shape) < 2) or (expert.places[old].whole and module.d_in == 1):
            problems.add(
                f"module '{old}' changes a vector, and a LoRA only changes matrices", "leave it out of the file"
            )
        new = modules[names[old]] = _renamed(module, names[old], shape)
        pairs = ((module.A, new.A), (module.B, new.B), (module.bias or "", new.bias or ""))
        entries |= {target: expert.file.entries[key] for key, target in pairs if key in expert.file.entries}
    problems.raise_any(f"'{expert.name}' cannot become an adapter of PEFT")
    file = replace(expert.file, entries=entries)
    return replace(expert, modules=modules, file=file, format=PEFT, places={})


def is_named_by_base(expert: Expert) -> bool:
    """Whether an adapter in another format than PEFT's has, or was given, the base whose modules it names."""
    return expert.format != PEFT and (_has_own_names(expert) or expert.base_override is not None)


def _has_own_names(expert: Expert) -> bool:
    """Whether its format names modules as transformers does."""
    return FORMATS.load(expert.format).naming == FORMATS.load(PEFT).naming


def _shapes(base: Base) -> dict[str, tuple[int, ...]]:
    """Name of a module in today's model → shape of its weight; empty if the base is not on this machine."""
    if base.folder is None:
        return {}
    from pimerge.checkpoints.checkpoint import open_checkpoint
    from pimerge.checkpoints.key_mapping import names_of  # imports torch and transformers

    checkpoint = open_checkpoint(base.folder)
    names = names_of(checkpoint)
    end = ".weight"
    return {
        name.removesuffix(end): checkpoint.entry(key).shape
        for key, name in names.parameter.items()
        if name.endswith(end)
    }


def in_base(names: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """Names in a file, which may be flattened or lack the first part → names of the base's modules.

    >>> in_base(["lycoris_model_h_0_q_proj", "h.0.v_proj"], ["model.h.0.q_proj", "model.h.0.v_proj"])
    {'lycoris_model_h_0_q_proj': 'model.h.0.q_proj', 'h.0.v_proj': 'model.h.0.v_proj'}
    """
    known: dict[str, set[str]] = {}
    for module in modules:
        for way in {module, module.partition(".")[2]} - {""}:
            known.setdefault(way, set()).add(module)
            known.setdefault(way.replace(".", "_"), set()).add(module)
    found: dict[str, str] = {}
    unknown, problems = [], Problems()
    for name in names:
        fits = known.get(name) or known.get(_FLAT.sub("", name, count=1).replace(".", "_")) or set()
        if len(fits) > 1:
            problems.add(f"'{name}' can be {' or '.join(sorted(fits))} of the base", "rename it in the file")
        elif fits:
            found[name] = next(iter(fits))
        else:
            unknown.append(name)
    if unknown:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        problems.add(
            f"the base has no module for {shown}", f"pass --base with the base that it was trained on; {_DIFFUSION}"
        )
    problems.raise_any("the modules of the adapter cannot be found in the base")
    return found


def _renamed(module: LoraModule, name: str, shape: tuple[int, ...]) -> LoraModule:
    """A module under another name, with the kernel of the base's weight if the file does not tell it.

    The base's weight also tells an embedding, whose ΔW is that of a linear layer transposed.
    """
    own = (module.d_out, module.d_in)
    turned = module.layer in ("linear", "embedding") and own in (shape, shape[::-1]) and shape[0] != shape[1]
    layer = ("linear" if own == shape else "embedding") if turned else module.layer
    renamed = in_layer(replace(module, name=name, bias=bias_key(name) if module.bias else None), layer)
    if module.layer != FLATTENED:
        return renamed
    kernel = shape[2:]
    if not kernel:
        return replace(renamed, layer="linear")
    shape_B = (*module.shape_B[:2], *(1 for _ in kernel))
    return replace(renamed, layer="conv", shape_A=(module.rank, *shape[1:]), shape_B=shape_B)
