"""A tiny CLIP, made once for all tests of a process, and a mesh of one device."""

import functools

import jax
from flax import nnx

from clip_jax.models import CLIP, CLIPConfig, TextConfig, ViTConfig

CONFIG = CLIPConfig(
    embed_dim=8,
    vision=ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
    text=TextConfig(width=16, heads=2, layers=1, context_length=32),
)


def made():
    """A model of its own, which a test may change."""

    @jax.jit
    def init():
        return nnx.to_pure_dict(nnx.state(CLIP(CONFIG, rngs=nnx.Rngs(1))))

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: CLIP(CONFIG, rngs=nnx.Rngs(1))))
    return nnx.merge(graphdef, init())


model = functools.cache(made)


def mesh_of_one():
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh((1, 1, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3)
