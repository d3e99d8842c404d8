"""Single-device descriptions of the models; nothing here knows of a mesh."""

from clip_jax.models.clip import CLIP, CLIPConfig, l2_normalize
from clip_jax.models.flops import Flops, forward_flops, training_flops
from clip_jax.models.layers import Training
from clip_jax.models.positions import resize_positions
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.stacks import unstack
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.models.zoo import available_models, create_model, model_config

__all__ = [
    "CLIP",
    "CLIPConfig",
    "Flops",
    "ResNetConfig",
    "TextConfig",
    "Training",
    "ViTConfig",
    "available_models",
    "create_model",
    "forward_flops",
    "l2_normalize",
    "model_config",
    "resize_positions",
    "training_flops",
    "unstack",
]
