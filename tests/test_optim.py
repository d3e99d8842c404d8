import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clip_jax.config import default_config
from clip_jax.errors import ConfigError
from clip_jax.models import CLIP, model_config
from clip_jax.optim import decay_mask, learning_rate_schedule, make_optimizer


def test_the_schedule_warms_up_linearly_and_ends_at_zero_as_a_cosine():
    schedule = learning_rate_schedule(5e-4, 2_000, 390_625)
    assert float(schedule(0)) == 0
    np.testing.assert_allclose(float(schedule(500)), 5e-4 * 500 / 2_000, rtol=1e-6)
    for step in (2_000, 10_000, 200_000, 390_000):
        done = (step - 2_000) / (390_625 - 2_000)
        expected = 5e-4 * (1 + np.cos(np.pi * done)) / 2
        np.testing.assert_allclose(float(schedule(step)), expected, rtol=1e-4, atol=1e-10)
    assert float(schedule(390_625)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("warmup", [-1, 100, 101])
def test_a_warm_up_that_is_not_shorter_than_the_run_is_refused(warmup):
    with pytest.raises(ConfigError, match=f"warmup_steps={warmup} .* train.steps=100"):
        learning_rate_schedule(1e-3, warmup, 100)


def test_without_warm_up_it_starts_at_the_peak():
    assert float(learning_rate_schedule(1e-3, 0, 100)(0)) == pytest.approx(1e-3)


def test_decay_leaves_out_gains_and_biases_and_nothing_else():
    model = nnx.eval_shape(lambda: CLIP(model_config("ViT-B/32"), rngs=nnx.Rngs(0)))
    mask = decay_mask(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, value in jax.tree_util.tree_flatten_with_path(mask)[0]
        if value
    }
    blocks = "transformer/blocks/"
    kernels = [
        *(f"attention/{name}/kernel" for name in ("query", "key", "value", "out")),
        "mlp/up/kernel",
        "mlp/down/kernel",
    ]
    assert decayed == {
        "visual/class_embedding",
        "visual/patch_embedding/kernel",
        "visual/position_embedding",
        "visual/projection",
        "text/token_embedding",
        "text/position_embedding",
        "text/projection",
        *(f"{tower}/{blocks}{kernel}" for tower in ("visual", "text") for kernel in kernels),
    }


def test_updates_are_adam_with_decoupled_decay():
    config = default_config().optim
    config.update(beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.3)
    optimizer = make_optimizer(config, lambda step: 0.1 / (1 + step))
    params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])}
    state = optimizer.init(params)
    expected = jax.tree.map(np.float64, params)
    mean = jax.tree.map(np.zeros_like, expected)
    square = jax.tree.map(np.zeros_like, expected)
    for step in range(4):
        gradients = {"kernel": jnp.array([0.5, step - 1.0]), "bias": jnp.array([0.1 * step])}
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name, decay in (("kernel", 0.3), ("bias", 0.0)):
            g = np.float64(gradients[name])
            mean[name] = 0.8 * mean[name] + 0.2 * g
            square[name] = 0.95 * square[name] + 0.05 * g**2
            m = mean[name] / (1 - 0.8 ** (step + 1))
            v = square[name] / (1 - 0.95 ** (step + 1))
            direction = m / (np.sqrt(v) + 1e-3) + decay * expected[name]
            expected[name] = expected[name] - 0.1 / (1 + step) * direction
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)
