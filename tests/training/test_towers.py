"""Whole runs of what is not a plain ViT: ResNets, a frozen tower, dropped patches."""

import numpy as np
import pytest

import clip_jax
from clip_jax.sharding import make_mesh
from clip_jax.training.loop import train
from clip_jax.training.program import make_program
from clip_jax.training.state import initial_state
from clip_jax.weights.source import flatten
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

    program = make_program(small_config, make_mesh(small_config.mesh))
    start = initial_state(
        program.architecture, program.optimizer, program.target, small_config.seed
    )
    before, after = flatten(start.params) | flatten(start.batch_stats), flatten(weights(whole))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert any(path.startswith("text/") for path in moved)
    statistics = {path for path in moved if path.endswith(("/mean", "/var"))}
    if kind is resnet:
        assert len(statistics) == 2 * (3 + 3 * 5 + 4)  # stem, bottlenecks, shortcuts; some stacked
    if kind is locked_image_tower:
        assert not any(path.startswith("visual/") for path in moved)
