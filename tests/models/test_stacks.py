"""A model whose layers are unstacked is the same model."""

import jax
import numpy as np
import pytest
from flax import nnx

from clip_jax.models import CLIP, CLIPConfig, ResNetConfig, TextConfig, Training, ViTConfig, unstack
from clip_jax.tokenizer import EOT, SOT

TEXT = TextConfig(width=32, heads=2, layers=2, context_length=8)
TOWERS = {
    "vit": ViTConfig(image_size=32, patch_size=8, width=32, layers=3, heads=2),
    "resnet": ResNetConfig(image_size=64, width=8, layers=(1, 2, 3, 1), heads=4),
}


@pytest.fixture(params=TOWERS, ids=TOWERS, scope="module")
def models(request):
    """Stacked, and unstacked of the same weights."""
    config = CLIPConfig(16, TOWERS[request.param], TEXT)
    return CLIP(config, rngs=nnx.Rngs(0)), unstack(CLIP(config, rngs=nnx.Rngs(0)))


def inputs(model):
    random = np.random.default_rng(0)
    size = model.config.vision.image_size
    tokens = random.integers(1, SOT, (4, 8)).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = SOT, EOT
    return random.standard_normal((4, size, size, 3), np.float32), tokens


def test_embeddings_and_features_are_the_same(models):
    images, tokens = inputs(models[0])

    @jax.jit
    def run(model):
        return (
            *model(images, tokens),
            model.encode_image(images, return_features=True, layer=-2),
            model.encode_text(tokens, return_features=True, layer=-2, final_norm=True),
        )

    for stacked, apart in zip(*map(run, models), strict=True):
        np.testing.assert_allclose(apart, stacked, atol=2e-5)


def test_no_layer_of_a_stack_is_left_and_nothing_is_copied():
    model = CLIP(CLIPConfig(16, TOWERS["vit"], TEXT), rngs=nnx.Rngs(0))
    stack = model.visual.transformer.blocks.mlp.up.kernel[...]
    start, size = stack.unsafe_buffer_pointer(), stack[0].nbytes
    apart = unstack(model)
    kernels = [block.mlp.up.kernel[...] for block in apart.visual.transformer.blocks]
    assert [kernel.shape for kernel in kernels] == 3 * [(32, 128)]
    assert [k.unsafe_buffer_pointer() - start for k in kernels] == [0, size, 2 * size]


def test_an_unstacked_resnet_learns_statistics_and_gradients(models):
    images, _ = inputs(models[0])
    training = Training(jax.random.split(jax.random.key(0), 4), ())

    @nnx.jit
    def learn(model):
        def loss(model):
            return (model.encode_image(images, training=training) ** 2).mean()

        gradients = nnx.grad(loss)(model)
        return [
            np.float64(1) * sum((leaf**2).sum() for leaf in jax.tree.leaves(tree))
            for tree in (gradients, nnx.state(model, nnx.BatchStat))
        ]

    np.testing.assert_allclose(learn(models[1]), learn(models[0]), rtol=1e-4)
