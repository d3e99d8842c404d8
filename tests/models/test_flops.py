"""The analytic FLOPs against those in the traced program and in XLA's own account."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from clip_jax.models import (
    CLIP,
    CLIPConfig,
    ResNetConfig,
    TextConfig,
    Training,
    ViTConfig,
    available_models,
    forward_flops,
    model_config,
    training_flops,
)

SMALL = CLIPConfig(
    64,
    ViTConfig(image_size=64, patch_size=8, width=128, layers=3, heads=2),
    TextConfig(width=128, heads=2, layers=2, context_length=32, vocab_size=512),
)
SMALL_RESNET = dataclasses.replace(SMALL, vision=ResNetConfig(64, 32, (1, 2, 1, 1), 16))


def traced_flops(jaxpr):
    """Two for each multiply-add of the products and convolutions; loops count their turns."""
    total = 0
    for equation in jaxpr.eqns:
        shapes = [getattr(v.aval, "shape", ()) for v in (*equation.invars, *equation.outvars)]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            rhs = equation.params["dimension_numbers"].rhs_spec
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[1]) // shapes[1][rhs[0]]
        elif equation.primitive.name == "cond":  # a way for each kind of backend
            (of_branch,) = {traced_flops(each.jaxpr) for each in equation.params["branches"]}
            total += of_branch
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                total += turns * traced_flops(inner)
    return total


def abstract(config, **options):
    model = nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0), **options))
    size, context = config.vision.image_size, config.text.context_length
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return model, image, jax.ShapeDtypeStruct((1, context), jnp.int32)


@pytest.mark.parametrize("name", available_models())
def test_of_every_model_they_are_those_of_the_traced_program(name):
    config = model_config(name)
    model, image, text = abstract(config)
    found = (
        traced_flops(jax.make_jaxpr(lambda m, x: m.encode_image(x))(model, image).jaxpr),
        traced_flops(jax.make_jaxpr(lambda m, x: m.encode_text(x))(model, text).jaxpr),
    )
    assert tuple(forward_flops(config)) == found


def test_patch_dropout_saves_them_in_training_only():
    config = dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, patch_dropout=0.5))
    assert forward_flops(config) == forward_flops(SMALL)
    model, image, _ = abstract(config)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    encode = jax.make_jaxpr(lambda m, x, keys: m.encode_image(x, training=Training(keys)))
    assert forward_flops(config, training=True).image == traced_flops(
        encode(model, image, keys).jaxpr
    )


def test_a_step_takes_three_forward_passes_or_one_where_a_tower_is_frozen():
    image, text = forward_flops(SMALL)
    assert training_flops(SMALL) == 3 * (image + text)
    assert training_flops(SMALL, frozen=("visual",)) == image + 3 * text


@pytest.mark.parametrize("config", [SMALL, SMALL_RESNET], ids=["vit", "resnet"])
def test_xla_counts_nearly_as_many(config):
    # More for norms and activations; fewer for convolutions, whose products with padding it omits.
    model, image, text = abstract(config, unroll=3)
    program = jax.jit(lambda m, x, t: (m.encode_image(x), m.encode_text(t)))
    counted = program.lower(model, image, text).cost_analysis()["flops"]
    assert 0.92 < counted / sum(forward_flops(config)) < 1.12
