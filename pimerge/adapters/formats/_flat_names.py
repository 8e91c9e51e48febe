"""Names of modules by which files of several tools are matched: flattened, as kohya's, with diffusers' names of blocks.

kohya's scripts flatten the names of a model (``.`` becomes ``_``). Those of diffusers and those under
``diffusion_model.`` can be flattened alike, so the flattened names match wherever the tools name a model alike. For
SDXL, sd-scripts trains the original UNet, whose blocks diffusers numbers otherwise
(``_maybe_map_sgm_blocks_to_diffusers`` and ``_convert_unet_lora_key`` in ``loaders/lora_conversion_utils.py``).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache

_UNET = "lora_unet_"
_PARTS = {"text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3", "text_encoder": "lora_te1", "unet": "lora_unet"}
_PART_OF = {flat: part for part, flat in _PARTS.items()}
_ORIGINAL = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks)_(\d+)_(?:(\d+)_)?(.+)")
_BLOCKS = ("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")
_INSIDE = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
_TODAY = re.compile(r"(?:(down|up)_blocks_(\d+)|mid_block)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_(.+)")
_MIDDLE = {0: "resnets_0", 1: "attentions_0", 2: "resnets_1"}
_WORDS = """down_blocks up_blocks mid_block transformer_blocks resnets attentions downsamplers upsamplers conv_shortcut
    conv_norm_out conv_in conv_out conv1 conv2 conv norm1 norm2 norm3 norm time_emb_proj time_embedding add_embedding
    linear_1 linear_2 proj_in proj_out proj attn1 attn2 to_q to_k to_v to_out ff net text_model encoder layers
    self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 layer_norm1 layer_norm2 final_layer_norm text_projection
    embeddings token_embedding position_embedding""".split()  # noqa: SIM905
"""The names inside diffusers' UNets and CLIP's text encoders, so that a flattened name can be split again."""
_WORD = "|".join(sorted(_WORDS, key=lambda word: -len(word)))
_SPLITTABLE = re.compile(rf"(?:{_WORD}|\d+)(?:_(?:{_WORD}|\d+))*")
_PIECE = re.compile(rf"({_WORD}|\d+)(?:_|$)")


@cache
def flat(name: str) -> str:
    """The flattened name of a module of diffusers, of ``diffusion_model.``, or of kohya's.

    >>> flat("unet.down_blocks.1.attentions.0.proj_in"), flat("lora_unet_input_blocks_4_1_proj_in")
    ('lora_unet_down_blocks_1_attentions_0_proj_in', 'lora_unet_down_blocks_1_attentions_0_proj_in')
    >>> flat("lora_te_text_model_encoder_layers_0_mlp_fc1"), flat("diffusion_model.blocks.0.self_attn.q")
    ('lora_te1_text_model_encoder_layers_0_mlp_fc1', 'lora_unet_blocks_0_self_attn_q')
    """
    name = re.sub(r"^(model\.)?diffusion_model\.", "unet.", name)
    part, dot, rest = name.partition(".")
    if dot:
        name = f"{_PARTS.get(part, f'lora_{part}')}_{rest.replace('.', '_')}"
    name = re.sub("^lora_te_", "lora_te1_", name)
    if name.startswith(_UNET) and (found := _OUTSIDE.get(name.removeprefix(_UNET))):
        return _UNET + found
    match = _ORIGINAL.fullmatch(name)
    return _UNET + _today(*match.groups()) if match else name


def _today(side: str, block: str, inner: str | None, rest: str) -> str:
    """The name in diffusers' UNet of a module of the original one."""
    number, place = int(block), int(inner or 0)
    if side == "middle_block":  # one number, and what follows it may begin with another
        inside = rest if inner is None else f"{inner}_{rest}"
        return f"mid_block_{_MIDDLE.get(number, number)}_{_INSIDE.get(inside, inside)}"
    at, layer = divmod(number - 1 if side == "input_blocks" else number, 3)
    half = "down" if side == "input_blocks" else "up"
    if rest == "op":
        return f"down_blocks_{at}_downsamplers_0_conv"
    if rest == "conv":
        return f"up_blocks_{at}_upsamplers_0_conv"
    return f"{half}_blocks_{at}_{'attentions' if place else 'resnets'}_{layer}_{_INSIDE.get(rest, rest)}"


def kohya_name(name: str, like: Collection[str], others: Collection[str]) -> str:
    """A flattened name in the form of a file of kohya's; empty if that form has none.

    Args:
        like: the names in the file.
        others: the flattened names of all modules.
    """
    is_original = any(each.startswith(_BLOCKS) for each in like)
    if name.startswith("lora_te1_"):
        texts = {each.partition("_text")[0] for each in like if each.startswith("lora_te")}
        two = is_original or any(each.startswith(("lora_te2", "lora_unet_add_embedding")) for each in others)
        return name if texts - {"lora_te"} or (two and not texts) else name.replace("lora_te1_", "lora_te_")
    return _original(name) if is_original and name.startswith(_UNET) else name


def _original(name: str) -> str:
    """The name in the original UNet of a module of diffusers'; empty if it has none.

    >>> _original("lora_unet_up_blocks_0_attentions_2_proj_in"), _original("lora_unet_mid_block_resnets_1_conv1")
    ('lora_unet_output_blocks_2_1_proj_in', 'lora_unet_middle_block_2_in_layers_2')
    """
    rest = name.removeprefix(_UNET)
    outside = {today: original for original, today in _OUTSIDE.items()}
    if rest in outside:
        return _UNET + outside[rest]
    match = _TODAY.fullmatch(rest)
    if match is None:
        return ""
    half, block, kind, layer, inside = match.groups()
    inside = {today: original for original, today in _INSIDE.items()}.get(inside, inside)
    if half is None:
        numbers = {text: number for number, text in _MIDDLE.items()}
        found = numbers.get(f"{kind}_{layer}")
        return "" if found is None else f"{_UNET}middle_block_{found}_{inside}"
    first = 3 * int(block)
    if kind == "downsamplers":
        return f"{_UNET}input_blocks_{first + 3}_0_op"
    if kind == "upsamplers":
        return f"{_UNET}output_blocks_{first + 2}_2_conv"
    number = first + int(layer) + (1 if half == "down" else 0)
    side = "input_blocks" if half == "down" else "output_blocks"
    return f"{_UNET}{side}_{number}_{1 if kind == 'attentions' else 0}_{inside}"


def dotted_name(name: str, like: Collection[str], others: Collection[str]) -> str:
    """A flattened name with its dots, as in a file with such names; empty if the names do not tell them.

    >>> dotted_name("lora_unet_blocks_1_self_attn_q", ["diffusion_model.blocks.0.self_attn.q"], [])
    'diffusion_model.blocks.1.self_attn.q'
    >>> dotted_name("lora_te1_text_model_encoder_layers_0_mlp_fc1", ["unet.conv_in"], [])
    'text_encoder.text_model.encoder.layers.0.mlp.fc1'
    """
    pattern = _form(name)
    forms = {_form(each) for each in like if _form(flat(each)) == pattern}
    part, _, rest = name.removeprefix("lora_").partition("_")
    known = {found for form in forms if flat(found := form.format(*re.findall(r"\d+", name))) == name}
    if known:
        return known.pop() if len(known) == 1 else ""
    is_named = (
        rest.startswith(("down_", "up_", "mid_", "conv_", "time_", "add_")) if part == "unet" else part[:2] == "te"
    )
    if any(each.startswith(("diffusion_model.", "model.")) for each in like) or not is_named:
        return ""
    if not _SPLITTABLE.fullmatch(rest):
        return ""
    return f"{_PART_OF[f'lora_{part}']}.{'.'.join(_PIECE.findall(rest))}"


@cache
def _form(name: str) -> str:
    """A name with places for its numbers."""
    return re.sub(r"\d+", "{}", name)
