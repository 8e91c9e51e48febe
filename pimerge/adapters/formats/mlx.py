"""mlx-lm: LoRA with transposed factors in ``adapters.safetensors`` and its scale in ``adapter_config.json``.

ΔW = (scale · bᵀ) aᵀ with a (d_in × r) and b (r × d_out) (``LoRALinear.fuse`` in ``mlx_lm/tuner/lora.py``); the scale is
the same in every module. Early versions divided by the rank: scale · alpha / rank. A mixture's experts are stacked and
not transposed, a (experts × r × d_in) and b (experts × d_out × r) (``LoRASwitchLinear.fuse``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pimerge.adapters.format import Content, Format, ForWriting, KeySummary
from pimerge.adapters.formats._keys import A_B, TRANSPOSED
from pimerge.adapters.formats._metadata import carried
from pimerge.adapters.formats._modules import ModuleReading, read_modules
from pimerge.checkpoints.safetensors_file import TensorFile
from pimerge.core.errors import PimergeError

_LOADING = """
from mlx_lm import load

model, tokenizer = load({base}, adapter_path="path/to/this/folder")
"""
_PLAIN = (None, "lora")
_EMBEDDINGS = ("embed_tokens", "embedding", "embeddings", "word_embeddings", "tok_embeddings", "embed_in", "wte", "wpe")
"""How mlx-lm's models name their embeddings, whose updates have the same keys as those of linear layers."""
_LAYER = re.compile(r".*\.(?:layers|h|blocks)\.\d+\.(?P<inside>.+)")


def _recognises(keys: KeySummary) -> bool:
    return TRANSPOSED.name in keys.endings


def _read(file: TensorFile, config: Mapping[str, Any] | None) -> Content:
    assert config is not None
    if config.get("fine_tune_type") not in _PLAIN:
        raise PimergeError(
            f"adapter_config.json states fine_tune_type '{config['fine_tune_type']}', which needs the base's weights",
            "fuse it into its base with mlx_lm.fuse, and merge full checkpoints with --base",
        )
    parameters = config.get("lora_parameters")
    parameters = config if parameters is None else parameters
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise PimergeError(
            "adapter_config.json has no number lora_parameters.scale, so the scaling is unknown",
            "expected the adapter_config.json that mlx-lm wrote with it",
        )
    stated = parameters.get("alpha")

    def alpha(name: str, rank: int) -> float:
        return scale * (rank if stated is None else stated)

    reading = ModuleReading(TRANSPOSED, alpha, is_embedding=lambda name: name.rpartition(".")[2] in _EMBEDDINGS)
    content = read_modules(_unstacked(file), reading, {"base_model_name_or_path": config.get("model")})
    places = {
        name: replace(place, stack=place.stem.rpartition(".")[0]) if place.ending is A_B else place
        for name, place in content.places.items()
    }
    return replace(content, places=places)


def _unstacked(file: TensorFile) -> TensorFile:
    """The file with the factors of each of a mixture's experts as tensors of their own, by their numbers."""
    entries = dict(file.entries)
    for key, B in file.entries.items():
        stem = key.removesuffix(TRANSPOSED.slots["B"])
        A = file.entries.get(stem + TRANSPOSED.slots["A"])
        if stem == key or len(B.shape) != 3 or A is None:
            continue
        count, _, rank = B.shape
        if A.shape not in ((count, rank, A.shape[-1]), (count * rank, A.shape[-1])):  # the latter in early versions
            continue
        del entries[key], entries[stem + TRANSPOSED.slots["A"]]
        for slot, entry, shape in (("A", A, (rank, A.shape[-1])), ("B", B, B.shape[1:])):
            size = (entry.end - entry.start) // count
            for number in range(count):
                start = entry.start + number * size
                part = entry._replace(shape=shape, start=start, end=start + size)
                entries[f"{stem}.{number}{A_B.slots[slot]}"] = part
    return replace(file, entries=entries)


def _documents(writing: ForWriting) -> dict[str, Any]:
    first = dict(writing.configs[0])
    names = {writing.places[name].stack or name for name in writing.ranks}
    inside = {match["inside"] if (match := _LAYER.fullmatch(name)) else name for name in names}
    counts = [count for config in writing.configs if isinstance(count := config.get("num_layers"), int) and count > 0]
    layers = max(counts) if len(counts) == len(writing.configs) else -1  # -1: all layers
    parameters = {
        "rank": max(writing.ranks.values()),
        "scale": 1.0,
        "dropout": 0.0,
        "keys": sorted(inside),
    }
    return {"adapter_config.json": {**first, "num_layers": layers, "lora_parameters": parameters}}


def _metadata(writing: ForWriting) -> dict[str, str]:
    return carried(writing.metadata)


FORMAT = Format(
    name="mlx",
    summary="LoRA of mlx-lm, with its adapter_config.json.",
    tool="ml-explore/mlx-lm",
    keys="model.layers.0.self_attn.q_proj.lora_a, .lora_b",
    rule="lora_parameters.scale of adapter_config.json",
    naming="transformers",
    recognises=_recognises,
    read=_read,
    needs_config=True,
    ending=TRANSPOSED,
    one_rank=True,
    metadata=_metadata,
    documents=_documents,
    file_name="adapters.safetensors",
    loading=_LOADING,
)
