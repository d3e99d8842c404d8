"""Position tables at another resolution."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clip_jax.models import CLIP, CLIPConfig, ResNetConfig, TextConfig, ViTConfig, resize_positions
from clip_jax.models.positions import resize_position_embedding
from tests.models.seeded import seeded

VIT = ViTConfig(image_size=16, patch_size=4, width=32, layers=1, heads=4)
RESNET = ResNetConfig(image_size=64, width=4, layers=(1, 1, 1, 1), heads=2)


def test_positions_resized_keep_the_class_token_and_the_picture_they_make():
    rows, columns = np.mgrid[0:7, 0:7] / 6
    grid = np.stack([rows, columns], axis=-1).reshape(49, 2)
    table = jnp.asarray(np.concatenate([[[9.0, -9.0]], grid]))
    resized = np.asarray(resize_position_embedding(table, 14 * 14 + 1))
    np.testing.assert_array_equal(resized[0], [9.0, -9.0])
    new = resized[1:].reshape(14, 14, 2)
    assert np.all(np.diff(new[:, 0, 0]) > 0)  # rows still run downwards
    assert np.all(np.diff(new[0, :, 1]) > 0)  # columns still run to the right
    np.testing.assert_allclose(new.mean((0, 1)), grid.mean(0), atol=1e-3)
    assert resize_position_embedding(table, 50) is table


def weights(vision):
    config = CLIPConfig(32, vision, TextConfig(width=16, heads=2, layers=1, vocab_size=64))
    model = seeded(lambda: CLIP(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize(
    ("old", "size", "changed"),
    [
        (VIT, 24, ("visual", "position_embedding")),
        (replace(VIT, class_token=False, pool="map"), 24, ("visual", "position_embedding")),
        (RESNET, 96, ("visual", "pool", "position_embedding")),
    ],
    ids=["class token", "no class token", "resnet"],
)
def test_only_the_image_positions_change(old, size, changed):
    new = replace(old, image_size=size)
    params = weights(old)
    resized = resize_positions(params, old, new)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(resized), jax.tree.leaves(params), strict=True
    ):
        if tuple(key.key for key in path) == changed:
            assert a.shape == (new.tokens, b.shape[1])
            kept = new.tokens % 3  # 36 patches and a class token or none, or 9 and the mean
            np.testing.assert_array_equal(a[:kept], b[:kept])
        else:
            assert a is b
    assert resize_positions(params, old, old) is params
