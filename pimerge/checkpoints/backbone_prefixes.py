"""The names under which models of transformers hold their backbone."""

from __future__ import annotations

BACKBONES = frozenset(
    """aimv2 albert align altclip beit bert bert_model biogpt bit blip bros canine chinese_clip clap clip convbert
    convnext convnextv2 cpmant cvt deberta decision_transformer deit depth_anything dinat dinov2
    dinov2_with_registers distilbert donut dpt efficientnet electra ernie esm flava fnet focalnet funnel git glpn
    gpt_neox gpt_neox_japanese groupvit hiera hubert ibert ijepa layoutlm layoutlmv2 layoutlmv3 led levit lilt
    longformer luke lxmert markuplm mgp_str mobilebert mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 model mpnet mra
    nomic_bert nystromformer owlv2 owlvit perceiver poolformer prophetnet pvt pvt_v2 reformer regnet rembert resnet
    roberta roberta_prelayernorm roc_bert roformer rwkv segformer sew sew_d siglip siglip2 splinter superpoint
    swiftformer swin swin2sr swinv2 tapas timesformer transformer vilt vit vits vivit wav2vec2 wav2vec2_bert
    wav2vec2_conformer wavlm x_clip yoso zoedepth""".split()  # noqa: SIM905
)
"""Values of ``base_model_prefix``, without those of parts beside which others with the same modules may stand, such as
``vision_model`` and ``encoder``."""
