"""Single-device descriptions of the models; nothing here knows of a mesh."""

from clip_jax.models.clip import CLIP, CLIPConfig, l2_normalize
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.models.zoo import available_models, model_config

__all__ = [
    "CLIP",
    "CLIPConfig",
    "TextConfig",
    "ViTConfig",
    "available_models",
    "l2_normalize",
    "model_config",
]
