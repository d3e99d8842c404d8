"""Whole runs of what is not a plain ViT: ResNets, a frozen tower, dropped patches."""

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax.training.loop import train
from tests.training.test_loop import Stop, assert_same, crash, weights


def resnet(config):
    config.model.name = "RN50"
    config.model.vision.update(image_size=32, patch_size=None, width=8, layers=(1, 2, 1, 1))
    config.model.vision.heads = 4


def locked_image_tower(config):
    resnet(config)
    config.optim.frozen = ("^visual/",)


def dropped_patches(config):
    config.model.vision.patch_dropout = 0.5


def changed(before, after):
    """Paths of the weights that are not the same."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), b in pairs
        if not np.array_equal(a, b)
    }


@pytest.mark.parametrize("kind", [resnet, locked_image_tower, dropped_patches])
def test_it_trains_resumes_after_a_crash_and_loads(kind, small_config, tmp_path):
    kind(small_config)
    small_config.train.steps = 6
    whole = train(small_config, str(tmp_path / "whole"))
    small_config.eval.every = 5  # behind a checkpoint
    with pytest.raises(Stop):
        train(small_config, str(tmp_path / "broken"), {"crash": crash})
    small_config.eval.every = 0
    resumed = train(small_config, str(tmp_path / "broken"))
    assert_same(weights(whole), weights(resumed))

    loaded, _ = clip_jax.load(tmp_path / "whole")
    size = loaded.config.vision.image_size
    images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    np.testing.assert_allclose(
        loaded.encode_image(images), whole.model.encode_image(images), rtol=1e-5, atol=1e-6
    )

    small_config.train.steps = 0
    start = train(small_config, str(tmp_path / "start"))
    moved = changed(weights(start), weights(whole))
    assert any(path.startswith("text/") for path in moved)
    statistics = {path for path in moved if path.endswith(("/mean", "/var"))}
    if kind is resnet:
        assert len(statistics) == 2 * (3 + 3 * 5 + 4)  # stem, bottlenecks, shortcuts; some stacked
    if kind is locked_image_tower:
        assert not any(path.startswith("visual/") for path in moved)
