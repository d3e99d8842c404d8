"""The named models: data, no code. Sizes from the paper's table 20 and the released code."""

import dataclasses
import difflib

from clip_jax.errors import ConfigError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

_TEXT_512 = TextConfig(width=512, heads=8)
_TEXT_768 = TextConfig(width=768, heads=12)
_VIT_B = ViTConfig(image_size=224, patch_size=16, width=768, layers=12, heads=12)
_VIT_L = ViTConfig(image_size=224, patch_size=14, width=1024, layers=24, heads=16)

MODELS: dict[str, CLIPConfig] = {
    "ViT-B/32": CLIPConfig(512, dataclasses.replace(_VIT_B, patch_size=32), _TEXT_512),
    "ViT-B/16": CLIPConfig(512, _VIT_B, _TEXT_512),
    "ViT-L/14": CLIPConfig(768, _VIT_L, _TEXT_768),
    "ViT-L/14@336px": CLIPConfig(768, dataclasses.replace(_VIT_L, image_size=336), _TEXT_768),
    # Not of the paper: small enough to learn the glyphs on two CPU cores in minutes.
    "ViT-glyphs": CLIPConfig(
        128,
        ViTConfig(image_size=48, patch_size=16, width=128, layers=4, heads=4),
        TextConfig(width=128, heads=4, layers=1, context_length=20),
    ),
}


def available_models() -> list[str]:
    """Names that `model_config` and the configs' `model.name` take."""
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
