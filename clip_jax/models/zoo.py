"""The named models: data, no code. Sizes from the paper's tables 19 and 20 and the released code.

The larger ViTs are OpenCLIP's, SigLIP-B/16 is big_vision's.
"""

import difflib
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import nnx

from clip_jax.errors import ConfigError
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

_TEXT_512 = TextConfig(width=512, heads=8)
_TEXT_640 = TextConfig(width=640, heads=10)
_TEXT_768 = TextConfig(width=768, heads=12)
_TEXT_1024 = TextConfig(width=1024, heads=16)
_TEXT_H = TextConfig(width=1024, heads=16, layers=24, activation="gelu")
_TEXT_BIG_G = TextConfig(width=1280, heads=20, layers=32, activation="gelu")

_VIT_B = ViTConfig(image_size=224, patch_size=16, width=768, layers=12, heads=12)
_VIT_L = ViTConfig(image_size=224, patch_size=14, width=1024, layers=24, heads=16)
_VIT_H = ViTConfig(
    image_size=224, patch_size=14, width=1280, layers=32, heads=16, activation="gelu"
)

MODELS: dict[str, CLIPConfig] = {
    "RN50": CLIPConfig(1024, ResNetConfig(224, 64, (3, 4, 6, 3), 32), _TEXT_512),
    "RN101": CLIPConfig(512, ResNetConfig(224, 64, (3, 4, 23, 3), 32), _TEXT_512),
    "RN50x4": CLIPConfig(640, ResNetConfig(288, 80, (4, 6, 10, 6), 40), _TEXT_640),
    "RN50x16": CLIPConfig(768, ResNetConfig(384, 96, (6, 8, 18, 8), 48), _TEXT_768),
    "RN50x64": CLIPConfig(1024, ResNetConfig(448, 128, (3, 15, 36, 10), 64), _TEXT_1024),
    "ViT-B/32": CLIPConfig(512, replace(_VIT_B, patch_size=32), _TEXT_512),
    "ViT-B/16": CLIPConfig(512, _VIT_B, _TEXT_512),
    "ViT-L/14": CLIPConfig(768, _VIT_L, _TEXT_768),
    "ViT-L/14@336px": CLIPConfig(768, replace(_VIT_L, image_size=336), _TEXT_768),
    "ViT-H/14": CLIPConfig(1024, _VIT_H, _TEXT_H),
    "ViT-g/14": CLIPConfig(1024, replace(_VIT_H, width=1408, layers=40, mlp_ratio=4.3637), _TEXT_H),
    "ViT-bigG/14": CLIPConfig(
        1280, replace(_VIT_H, width=1664, layers=48, mlp_ratio=4.9231), _TEXT_BIG_G
    ),
    "SigLIP-B/16": CLIPConfig(
        768,
        replace(
            _VIT_B,
            activation="gelu_tanh",
            pool="map",
            class_token=False,
            pre_norm=False,
            patch_bias=True,
            projection=False,
            norm_epsilon=1e-6,
        ),
        TextConfig(
            width=768,
            heads=12,
            context_length=64,
            vocab_size=32_000,
            activation="gelu_tanh",
            pool="last",
            causal=False,
            projection_bias=True,
            norm_epsilon=1e-6,
        ),
        logit_bias=True,
    ),
    # Not of the paper: small enough to learn the glyphs on two CPU cores in minutes.
    "ViT-glyphs": CLIPConfig(
        128,
        ViTConfig(image_size=48, patch_size=16, width=128, layers=4, heads=4),
        TextConfig(width=128, heads=4, layers=1, context_length=20),
    ),
}


def available_models() -> list[str]:
    """Names that `create_model`, `model_config` and the configs' `model.name` take."""
    return list(MODELS)


def model_config(name: str) -> CLIPConfig:
    """The architecture of a named model.

    Raises:
        ConfigError: no such name; the message lists the names and the closest one.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"no model named {name!r}{hint} Available: {', '.join(MODELS)}")
    return MODELS[name]


def create_model(name: str, *, seed: int = 0, dtype: Any = jnp.float32, **options: Any) -> CLIP:
    """A named model with random initial weights.

    Args:
        name: one of `available_models()`.
        seed: of the weights.
        dtype: compute dtype; the parameters are float32.
        **options: the others of `CLIP`: remat, unroll.

    Raises:
        ConfigError: no such name.
    """
    return CLIP(model_config(name), dtype=dtype, rngs=nnx.Rngs(seed), **options)
