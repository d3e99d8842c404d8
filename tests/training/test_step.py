"""The step on every mesh against a single-device step written in the plainest way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from clip_jax.data.batch import Batch
from clip_jax.models import CLIP, CLIPConfig, TextConfig, ViTConfig
from clip_jax.optim import decay_mask
from clip_jax.preprocess import Preprocess
from clip_jax.sharding import shard_batch
from clip_jax.tokenizer import EOT, SOT
from clip_jax.training.state import abstract_model, abstract_state, initial_state
from clip_jax.training.step import make_train_step

CONFIG = CLIPConfig(
    embed_dim=16,
    vision=ViTConfig(image_size=16, patch_size=8, width=32, layers=2, heads=4),
    text=TextConfig(width=32, heads=4, layers=2, context_length=8),
)
PREPROCESS = Preprocess(16)


def schedule(step):
    return 1e-3 / (1 + step)


OPTIMIZER = optax.adamw(schedule, weight_decay=0.2, mask=decay_mask)


def batch(seed, rows=16):
    random = np.random.default_rng(seed)
    tokens = random.integers(1, SOT, (rows, 8)).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = SOT, EOT
    return Batch(random.integers(0, 256, (rows, 16, 16, 3), np.uint8), tokens)


def run(mesh, steps=5, max_logit_scale=100.0):
    model = abstract_model(CONFIG)
    state = initial_state(CONFIG, OPTIMIZER, mesh, seed=3)
    target = abstract_state(model, OPTIMIZER, mesh)
    step = make_train_step(model, OPTIMIZER, schedule, PREPROCESS, max_logit_scale, target, mesh)
    history = []
    for number in range(steps):
        state, metrics = step(state, shard_batch(batch(number), mesh))
        history.append(jax.device_get(metrics))
    assert step._cache_size() == 1  # it compiled once
    return state, history


def plain_run(steps=5):
    """One device, no mesh, the loss from the whole matrix, autodiff through everything."""
    model = CLIP(CONFIG, rngs=nnx.Rngs(jax.random.key(3)))
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    opt_state = OPTIMIZER.init(params)

    def loss_of(params, batch):
        pixels = (batch.image / 255.0 - jnp.array(PREPROCESS.mean)) / jnp.array(PREPROCESS.std)
        logits, _ = nnx.merge(graphdef, params)(pixels.astype(jnp.float32), batch.tokens)
        labels = jnp.arange(len(logits))
        cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)).mean() / 2

    history = []
    for number in range(steps):
        loss, gradients = jax.value_and_grad(loss_of)(params, batch(number))
        updates, opt_state = OPTIMIZER.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        history.append((float(loss), float(optax.tree.norm(gradients))))
    return params, history


@pytest.fixture(scope="module")
def plain():
    return plain_run()


def test_losses_gradients_and_weights_equal_the_plain_step_on_every_mesh(mesh, plain):
    params, expected = plain
    state, history = run(mesh)
    for found, (loss, gradient_norm) in zip(history, expected, strict=True):
        assert found["loss"] == pytest.approx(loss, rel=2e-5)
        assert found["gradient_norm"] == pytest.approx(gradient_norm, rel=2e-4)
    assert int(state.step) == 5
    found, expected = jax.tree.leaves_with_path(state.params), jax.tree.leaves(params)
    for (path, a), b in zip(found, expected, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("key/bias"):
            continue  # softmax ignores it: its gradient is rounding noise, which Adam blows up
        np.testing.assert_allclose(a, b, atol=3e-4, err_msg=name)


def test_initial_weights_do_not_depend_on_the_mesh(mesh):
    alone = jax.make_mesh(
        (1, 1, 1),
        ("data", "fsdp", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[:1],
    )
    expected = initial_state(CONFIG, OPTIMIZER, alone, seed=3).params
    found = initial_state(CONFIG, OPTIMIZER, mesh, seed=3).params
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(expected), jax.device_get(found))


def test_the_state_stays_where_the_rules_put_it(mesh):
    before = initial_state(CONFIG, OPTIMIZER, mesh, seed=3)
    shardings = jax.tree.map(lambda x: x.sharding, before)
    after, _ = run(mesh, steps=2)
    moved = jax.tree.map(
        lambda x, sharding: not x.sharding.is_equivalent_to(sharding, x.ndim), after, shardings
    )
    assert not any(jax.tree.leaves(moved))


def test_the_logit_scale_is_learned_and_never_passes_the_cap(mesh):
    _, history = run(mesh)
    scales = [metrics["logit_scale"] for metrics in history]
    assert scales[0] == pytest.approx(1 / 0.07, rel=1e-5)
    assert len(set(map(float, scales))) == len(scales)
    capped, history = run(mesh, max_logit_scale=10.0)
    assert float(jnp.exp(capped.params["logit_scale"])) <= 10.0 * (1 + 1e-6)
    assert all(metrics["logit_scale"] <= 10.0 * (1 + 1e-6) for metrics in history[1:])


def test_the_learning_rate_in_the_log_is_the_one_applied(mesh):
    _, history = run(mesh, steps=3)
    for step, metrics in enumerate(history):
        assert metrics["learning_rate"] == pytest.approx(schedule(step))
