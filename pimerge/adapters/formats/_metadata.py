"""Metadata that formats share: what a merged file carries from its sources, and what is stated anew."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from pimerge.adapters.format import ForWriting

_HASHES = ("sshs_", "modelspec.hash", "modelspec.date", "modelspec.thumbnail")
BASE_VERSION = "ss_base_model_version"
NETWORK, ARGUMENTS, DIM, ALPHA = "ss_network_module", "ss_network_args", "ss_network_dim", "ss_network_alpha"


def carried(sources: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The entries that all sources share, without hashes of the old content.

    >>> carried([{"ss_v2": "False", "sshs_model_hash": "1"}, {"ss_v2": "False", "ss_epoch": "2"}])
    {'ss_v2': 'False'}
    """
    first, *others = sources
    return {
        name: text
        for name, text in first.items()
        if not name.startswith(_HASHES) and all(other.get(name) == text for other in others)
    }


def base_of(metadata: Mapping[str, str]) -> str:
    """The base model, which kohya's scripts and ai-toolkit state by its architecture."""
    return metadata.get(BASE_VERSION, "")


def part_of_model(name: str) -> str:
    """The part of a pipeline in the name of a module of kohya's.

    >>> part_of_model("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    'lora_te1'
    """
    return "_".join(name.split("_", 2)[:2])


def kohya_metadata(writing: ForWriting, module: str, arguments: Mapping[str, str]) -> dict[str, str]:
    """The entries by which kohya's scripts and user interfaces know a network.

    As in kohya's ``networks/svd_merge_lora.py``, ``ss_network_dim`` and ``ss_network_alpha`` are ``Dynamic`` if they
    differ between modules, and the dims of convolutions are in ``ss_network_args``.

    Args:
        module: the network module that reads the file.
        arguments: its arguments, beside those for convolutions.
    """
    linear, conv = (
        [n for n in writing.ranks if (len(writing.layouts[n].shape_A) > 2) is wide] for wide in (False, True)
    )
    own = linear or conv
    given = dict(arguments)
    if linear and conv:
        given |= {
            "conv_dim": _one([writing.ranks[name] for name in conv]),
            "conv_alpha": _one([writing.alphas[name] for name in conv]),
        }
    known = {name: text for name, text in carried(writing.metadata).items() if name != ARGUMENTS}
    return {
        **known,
        NETWORK: module,
        DIM: _one([writing.ranks[name] for name in own]),
        ALPHA: _one([writing.alphas[name] for name in own]),
        **({ARGUMENTS: json.dumps(given)} if given else {}),
    }


def _one(values: Sequence[float]) -> str:
    """The value that all share, as text, or ``Dynamic``."""
    return f"{values[0]:g}" if len(set(values)) == 1 else "Dynamic"
