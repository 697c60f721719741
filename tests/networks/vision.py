"""The convolutional networks and vision transformers of torchvision and timm."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from tests.networks.zoo import CHANNELS, FEATURES, Network, images, words


def torchvision(
    name: str, size: int, *, axes: Mapping[str, int | tuple[int, ...]] = CHANNELS, gated: int = 0, **options: Any
) -> Network:
    def build() -> nn.Module:
        models = importlib.import_module("torchvision.models")
        return getattr(models, name)(num_classes=10, **options)

    config = ", ".join(part for part in (words(options), f"{size} px") if part)
    return Network("torchvision", name, config, build, images(size, "x"), axes, gated)


def timm(
    name: str, size: int, *, axes: Mapping[str, int | tuple[int, ...]] = CHANNELS, gated: int = 0, **options: Any
) -> Network:
    def build() -> nn.Module:
        return importlib.import_module("timm").create_model(name, pretrained=False, num_classes=10, **options)

    config = ", ".join(part for part in (words(options), f"{size} px") if part)
    return Network("timm", name, config, build, images(size, "x"), axes, gated)


VIT = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 40}
DENSE = {"growth_rate": 8, "block_config": (2, 3), "num_init_features": 12}

TORCHVISION = (
    torchvision("alexnet", 64, axes={"features.*": 1, "*": -1}),
    torchvision("vgg11", 32, axes={"features.*": 1, "*": -1}),
    torchvision("resnet18", 32),
    torchvision("resnext50_32x4d", 32),
    torchvision("DenseNet", 32, **DENSE),
    torchvision("googlenet", 64, aux_logits=True, init_weights=False, axes={"aux?.relu*": -1, "aux?.fc*": -1, "*": 1}),
    torchvision("inception_v3", 299, aux_logits=True, init_weights=False),
    torchvision("squeezenet1_1", 32),
    torchvision("shufflenet_v2_x0_5", 64),
    torchvision("mobilenet_v2", 64),
    torchvision("mobilenet_v3_small", 64, axes={"classifier.*": -1, "*": 1}),
    torchvision("mnasnet0_5", 64),
    torchvision("efficientnet_b0", 64),
    torchvision("efficientnet_v2_s", 64),
    torchvision("regnet_y_400mf", 64),
    torchvision("convnext_tiny", 64, axes=FEATURES),
    torchvision("VisionTransformer", 32, axes=FEATURES, **VIT),
    torchvision("swin_t", 64, axes=FEATURES),
    torchvision("swin_v2_t", 64, axes={"*.attn.sigmoid()": 1, "*": -1}),
    torchvision(
        "MaxVit",
        64,
        axes={"*.window_attention.*": -1, "*.grid_attention.*": -1, "*.mlp.*": -1, "classifier.*": -1, "*": 1},
        input_size=(64, 64),
        stem_channels=8,
        partition_size=2,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.0,
    ),
)

TIMM = (
    timm("mixer_s32_224", 64, axes=FEATURES, img_size=64),
    timm("convnext_atto", 64),
    timm("ghostnet_050", 64),
    timm("levit_128s", 64, img_size=64, axes={"stem.*": 1, "*": -1}),
    timm("efficientformer_l1", 224, axes={"stages.3.blocks.4.*": -1, "*": 1}),
    timm("resnetv2_50x1_bit", 32),
    timm("nfnet_f0", 64),
    timm("hardcorenas_a", 64),
    timm("mobilenetv3_small_050", 64),
    timm("eva02_tiny_patch14_224", 28, img_size=28, axes=FEATURES, gated=12),
    timm("vit_tiny_patch16_224", 32, img_size=32, axes=FEATURES),
    timm("gmlp_s16_224", 32, img_size=32, axes=FEATURES),
    timm("poolformer_s12", 64),
    timm("coatnet_pico_rw_224", 64, img_size=64),
    timm("regnetx_002", 64),
    timm("edgenext_xx_small", 64, axes=FEATURES),
    timm("xcit_nano_12_p16_224", 32, img_size=32, axes={"patch_embed.*": 1, "*.local_mp.*": 1, "*": -1}),
    timm("tresnet_m", 64),
    timm("cspresnet50", 64),
    timm("efficientvit_b0", 64, axes={"*.kernel_func": (1, 3), "head.*": 1, "*": 1}),
    timm("fastvit_t8", 64),
    timm("repvgg_a0", 64),
    timm("dla34", 64),
    timm("hrnet_w18_small", 64),
)
