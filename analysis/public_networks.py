"""195 public networks with random weights, and inputs that they can be called with: the list of any_network.py.

torchvision 80 and timm 73 by name, in sizes that are released, and 42 architectures of transformers in small
configurations made by hand: heads, widths and depths are different numbers, in about the proportions of released ones,
since the share that can go depends on these. Images are as small as a network allows: their size changes no structure.

Kinds: "vision transformer" (attention in at least half of the blocks), "language model", "convolutional", "detection",
"segmentation", "video", and "other" (mixers, few attention blocks, speech, images with text).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

SOURCES = {"torchvision": 80, "transformers": 42, "timm": 73}
EXAMPLES = 3
CLASSES = 10
# one line of names after the other, without a size of image that they need
_CONVOLUTIONAL_OF_TORCHVISION = """
    convnext_tiny convnext_small densenet121 densenet161 densenet169 densenet201
    efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_v2_s
    mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small
    regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf
    regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf
    resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d wide_resnet50_2
    shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0
    squeezenet1_0 squeezenet1_1 vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19
"""
_TRANSFORMERS_OF_TIMM = """
    vit_tiny_patch16_224 vit_small_patch16_224 vit_base_patch16_224 vit_large_patch16_224
    deit_tiny_distilled_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 cait_xxs24_224 pit_ti_224
    swin_tiny_patch4_window7_224
"""
_CONVOLUTIONAL_OF_TIMM = """
    convmixer_768_32 convnext_atto convnextv2_atto nf_resnet50 nfnet_l0 eca_nfnet_l0 res2net50_26w_4s
    resnest14d cspresnet50 cspdarknet53 dla34 dpn68 hrnet_w18_small
    efficientnet_b0 efficientnet_lite0 tf_efficientnetv2_b0 tinynet_e mobilenetv3_small_050
    mobilenetv4_conv_small mobileone_s0 repvgg_a0 ghostnet_100 ghostnetv2_100 regnetx_002 regnety_002
    regnetz_b16 rexnet_100 skresnet18 seresnet50 vgg11 legacy_xception convformer_s18 fastvit_t8
    mambaout_femto hgnet_tiny hgnetv2_b0 lcnet_050 selecsls42
"""
TRANSFORMER, LANGUAGE, CONVOLUTIONAL = "vision transformer", "language model", "convolutional"
DETECTION, SEGMENTATION, VIDEO, OTHER = "detection", "segmentation", "video", "other"


@dataclass(frozen=True)
class PublicNetwork:
    """A network of the list.

    Attributes:
        source: package that has it.
        name: in that package.
        kind: see above.
        build: makes it, in evaluation mode, with new random weights.
        inputs: makes examples, new ones at each call.
    """

    source: str
    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]


def public_networks() -> list[PublicNetwork]:
    """All of them, by source."""
    networks = [*_of_torchvision(), *_of_transformers(), *_of_timm()]
    found = {source: sum(network.source == source for network in networks) for source in SOURCES}
    assert found == SOURCES, found
    assert len({(n.source, n.name) for n in networks}) == len(networks)
    return networks


def _images(*shape: int) -> Tensor:
    """Noise that differs between examples as a whole too, so that what is pooled over positions still varies."""
    return torch.randn(EXAMPLES, *shape) + 2 * torch.randn(EXAMPLES, shape[0], *[1] * (len(shape) - 1))


def _images_in_list(size: int) -> list[Tensor]:
    return list(_images(3, size, size))


def _torchvision(name: str, kind: str, inputs: Callable[[], Any], **options: Any) -> PublicNetwork:
    def build() -> nn.Module:
        from torchvision.models import get_model

        return get_model(name, weights=None, **options).eval()

    return PublicNetwork("torchvision", name, kind, build, inputs)


def _of_torchvision() -> list[PublicNetwork]:
    small = partial(_images, 3, 64, 64)
    # auxiliary heads, as these have by default, need a larger image
    networks = [
        _torchvision("alexnet", CONVOLUTIONAL, partial(_images, 3, 96, 96)),
        _torchvision("googlenet", CONVOLUTIONAL, partial(_images, 3, 128, 128), init_weights=False),
        _torchvision("inception_v3", CONVOLUTIONAL, partial(_images, 3, 160, 160), init_weights=False),
    ]
    networks += [_torchvision(name, CONVOLUTIONAL, small) for name in _CONVOLUTIONAL_OF_TORCHVISION.split()]
    networks += [
        _torchvision(name, TRANSFORMER, small)
        for name in ("swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b")
    ]
    networks += [
        _torchvision(name, TRANSFORMER, small, image_size=64) for name in ("vit_b_16", "vit_b_32", "vit_l_32")
    ]
    networks.append(_torchvision("maxvit_t", TRANSFORMER, partial(_images, 3, 224, 224)))
    networks += [
        _torchvision(name, SEGMENTATION, small, weights_backbone=None)
        for name in (
            "fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large",
        )
    ]  # fmt: skip
    # with random weights no score is high: all of the boxes are passed on, so that there is something to compare
    two_stages = {"box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 10}
    one_stage = {"score_thresh": 0.0, "detections_per_img": 10}
    for name, options in {
        "fasterrcnn_resnet50_fpn": two_stages, "fasterrcnn_mobilenet_v3_large_fpn": two_stages,
        "maskrcnn_resnet50_fpn": two_stages, "keypointrcnn_resnet50_fpn": two_stages,
        "retinanet_resnet50_fpn": one_stage, "fcos_resnet50_fpn": one_stage,
    }.items():  # fmt: skip
        sizes = {"min_size": 96, "max_size": 96, "weights_backbone": None}
        networks.append(_torchvision(name, DETECTION, partial(_images_in_list, 96), **sizes, **options))
    for name, size in {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}.items():
        networks.append(
            _torchvision(name, DETECTION, partial(_images_in_list, size), weights_backbone=None, **one_stage)
        )
    networks += [
        _torchvision(name, VIDEO, partial(_images, 3, frames, size, size))
        for name, frames, size in (
            ("r3d_18", 8, 32), ("mc3_18", 8, 32), ("r2plus1d_18", 8, 32), ("s3d", 16, 224), ("swin3d_t", 4, 64),
        )
    ]  # fmt: skip
    networks += [
        replace(
            _torchvision(name, VIDEO, partial(_images, 3, 8, 64, 64)), build=partial(_multiscale_video, name)
        )
        for name in ("mvit_v1_b", "mvit_v2_s")
    ]
    return networks


def _multiscale_video(name: str) -> nn.Module:
    """torchvision's network for smaller videos than its builder allows, which would take minutes."""
    from torchvision.models import get_model
    from torchvision.models.video import mvit

    of_any_size = mvit._mvit

    def of_this_size(**options: Any) -> nn.Module:
        return of_any_size(**options | {"spatial_size": (64, 64), "temporal_size": 8})

    with patch.object(mvit, "_mvit", of_this_size):
        return get_model(name, weights=None).eval()


def _transformers(
    stem: str, head: str, kind: str, inputs: Callable[[], Any], **settings: Any
) -> PublicNetwork:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{stem}Config")(**settings)
        return getattr(transformers, f"{stem}{head}")(config).eval()

    return PublicNetwork("transformers", f"{stem}{head}", kind, build, inputs)


def _tokens(*names: str, length: int = 11) -> dict[str, Tensor]:
    """Tokens of none of the special numbers."""
    return {name: torch.randint(5, 90, (EXAMPLES, length)) for name in names}


def _pixels(size: int = 48) -> dict[str, Tensor]:
    return {"pixel_values": _images(3, size, size)}


def _of_transformers() -> list[PublicNetwork]:
    text, both = partial(_tokens, "input_ids"), partial(_tokens, "input_ids", "decoder_input_ids")
    sizes = dict(hidden_size=96, num_attention_heads=8, num_hidden_layers=3, vocab_size=97)
    wide = sizes | dict(intermediate_size=380)
    bert = wide | dict(max_position_embeddings=40, num_labels=CLASSES)
    llama = wide | dict(
        num_key_value_heads=4, max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    language = partial(_transformers, kind=LANGUAGE, inputs=text)
    classifier = partial(language, head="ForSequenceClassification")
    causal = partial(language, head="ForCausalLM")
    encoder_decoder = dict(
        d_model=96, encoder_layers=3, decoder_layers=2, encoder_attention_heads=8, decoder_attention_heads=6,
        encoder_ffn_dim=380, decoder_ffn_dim=388, vocab_size=97, max_position_embeddings=40,
    )  # fmt: skip
    names = [
        classifier("Bert", **bert),
        classifier("Roberta", **bert),
        classifier(
            "DistilBert", dim=96, n_heads=8, n_layers=3, hidden_dim=380, vocab_size=97, num_labels=CLASSES
        ),
        classifier("Albert", **bert, embedding_size=28),
        classifier("Electra", **bert, embedding_size=28),
        classifier("DebertaV2", **bert, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        classifier("MPNet", **bert),
        language(
            "GPT2", head="LMHeadModel", n_embd=96, n_head=8, n_layer=3, n_positions=40, n_inner=380, vocab_size=97
        ),
        causal(
            "GPTNeo", hidden_size=96, num_heads=8, num_layers=3, attention_types=[[["global", "local", "global"], 1]],
            intermediate_size=380, vocab_size=97, max_position_embeddings=40, window_size=4,
        ),
        causal("GPTNeoX", **wide, max_position_embeddings=40),
        causal("GPTJ", n_embd=96, n_head=8, n_layer=3, n_positions=40, n_inner=380, rotary_dim=6, vocab_size=97),
        causal("OPT", **sizes, ffn_dim=380, max_position_embeddings=40, word_embed_proj_dim=96),
        causal("Bloom", hidden_size=96, n_head=8, n_layer=3, vocab_size=97),
        causal("Falcon", **sizes, ffn_hidden_size=380),
        causal("Llama", **llama),
        causal("Mistral", **llama, head_dim=12),
        causal("Mixtral", **llama, head_dim=12, num_local_experts=5, num_experts_per_tok=2),
        causal("Qwen2", **llama),
        causal("Qwen3", **llama, head_dim=14),
        causal("Gemma", **llama, head_dim=14),
        causal("Gemma2", **llama, head_dim=14, query_pre_attn_scalar=14, sliding_window=6),
        causal("Phi", **llama),
        causal("Phi3", **llama),
        causal(
            "StableLm", **llama,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
        ),
        causal("Olmo", **llama),
        causal("Cohere", **llama),
        _transformers(
            "T5", "ForConditionalGeneration", LANGUAGE, both, d_model=96, d_kv=14, d_ff=380, num_layers=3,
            num_heads=8, vocab_size=97, decoder_start_token_id=0,
        ),
        _transformers("Bart", "ForConditionalGeneration", LANGUAGE, both, **encoder_decoder),
        _transformers("Pegasus", "ForConditionalGeneration", LANGUAGE, both, **encoder_decoder),
    ]  # fmt: skip
    vision = partial(_transformers, head="ForImageClassification", kind=TRANSFORMER, inputs=_pixels)
    layers = dict(
        hidden_size=96, num_attention_heads=8, num_hidden_layers=3, image_size=24, num_labels=CLASSES
    )
    stages = dict(depths=[2, 4], num_labels=CLASSES)
    names += [
        vision("ViT", inputs=partial(_pixels, 24), **layers, intermediate_size=380, patch_size=4),
        vision(
            "Beit", inputs=partial(_pixels, 24), **layers, intermediate_size=380, patch_size=4,
            use_relative_position_bias=True,
        ),
        vision("Dinov2", inputs=partial(_pixels, 24), **layers, mlp_ratio=4, patch_size=4),
        vision(
            "Swin", **stages, embed_dim=48, num_heads=[6, 12], window_size=3, image_size=48, patch_size=4
        ),
        vision(
            "Hiera", **stages, embed_dim=48, num_heads=[6, 12], image_size=[48, 48], num_query_pool=1,
            masked_unit_size=[4, 4],
        ),
        vision(
            "Segformer", num_encoder_blocks=2, depths=[2, 3], sr_ratios=[2, 1], hidden_sizes=[48, 96],
            patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[4, 8], mlp_ratios=[4, 4], num_labels=CLASSES,
        ),
        vision("ConvNext", kind=CONVOLUTIONAL, **stages, num_stages=2, hidden_sizes=[24, 40]),
        vision("ConvNextV2", kind=CONVOLUTIONAL, **stages, num_stages=2, hidden_sizes=[24, 40]),
        vision(
            "MobileViT", kind=OTHER, image_size=64, inputs=partial(_pixels, 64), num_labels=CLASSES,
            hidden_sizes=[36, 44, 52], neck_hidden_sizes=[16, 24, 32, 40, 48, 56, 72], num_attention_heads=4,
        ),
        _transformers(
            "CLIP", "Model", OTHER, lambda: _tokens("input_ids") | _pixels(24), projection_dim=30,
            text_config=bert | dict(eos_token_id=2),
            vision_config=dict(
                hidden_size=112, num_attention_heads=8, num_hidden_layers=2, intermediate_size=450, image_size=24,
                patch_size=4,
            ),
        ),
        _transformers(
            "Whisper", "ForConditionalGeneration", OTHER,
            lambda: {"input_features": _images(20, 60)} | _tokens("decoder_input_ids"), num_mel_bins=20,
            max_source_positions=30, max_target_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, **{k: v for k, v in encoder_decoder.items() if k != "max_position_embeddings"},
        ),
        _transformers(
            "Wav2Vec2", "ForSequenceClassification", OTHER,
            lambda: {"input_values": torch.randn(EXAMPLES, 800) * (1 + torch.rand(EXAMPLES, 1))}, **wide,
            conv_dim=[20, 28], conv_kernel=[10, 3], conv_stride=[5, 2], num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=3, num_labels=CLASSES, classifier_proj_size=26,
        ),
        causal("Mamba", hidden_size=96, num_hidden_layers=3, state_size=7, vocab_size=97, time_step_rank=5),
    ]  # fmt: skip
    return names


def _timm(name: str, kind: str, size: int = 64, **options: Any) -> PublicNetwork:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options).eval()

    return PublicNetwork("timm", name, kind, build, partial(_images, 3, size, size))


def _of_timm() -> list[PublicNetwork]:
    # made for a smaller image; the others of these kinds take no other size
    small = dict(img_size=64)
    networks = [_timm(name, TRANSFORMER, **small) for name in _TRANSFORMERS_OF_TIMM.split()]
    networks += [
        _timm("swinv2_tiny_window8_256", TRANSFORMER, 128, img_size=128),
        _timm("mvitv2_tiny", TRANSFORMER, **small),
        _timm("eva02_tiny_patch14_224", TRANSFORMER, 56, img_size=56),
        _timm("hiera_tiny_224", TRANSFORMER, 224),
        _timm("volo_d1_224", TRANSFORMER, **small),
        _timm("xcit_nano_12_p16_224", TRANSFORMER),
        _timm("davit_tiny", TRANSFORMER, 224),
        _timm("twins_pcpvt_small", TRANSFORMER, 224),
        _timm("twins_svt_small", TRANSFORMER, 224),
        _timm("levit_128s", TRANSFORMER, 224),
        _timm("tiny_vit_5m_224", TRANSFORMER, 224),
        _timm("maxvit_pico_rw_256", TRANSFORMER, 64, **small),
        _timm("coatnet_nano_rw_224", TRANSFORMER, 64, **small),
        _timm("mixer_s32_224", OTHER, **small),
        _timm("resmlp_12_224", OTHER, **small),
        _timm("gmlp_ti16_224", OTHER, **small),
        _timm("efficientformer_l1", OTHER, 224),
        _timm("efficientformerv2_s0", OTHER, 224),
        _timm("mobilenetv4_hybrid_medium", OTHER, 64),
        _timm("poolformer_s12", OTHER),
        _timm("caformer_s18", TRANSFORMER),
        _timm("edgenext_xx_small", OTHER),
        _timm("focalnet_tiny_srf", OTHER),
    ]
    networks += [_timm(name, CONVOLUTIONAL) for name in _CONVOLUTIONAL_OF_TIMM.split()]
    networks += [
        _timm("inception_v4", CONVOLUTIONAL, 128),
        _timm("inception_resnet_v2", CONVOLUTIONAL, 128),
    ]
    return networks
