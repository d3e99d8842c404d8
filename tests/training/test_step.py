"""The step on every mesh against a single-device step written in the plainest way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from clip_jax.config import default_config
from clip_jax.data.batch import Batch
from clip_jax.models import CLIP, CLIPConfig, TextConfig, ViTConfig
from clip_jax.optim import decay_mask, make_optimizer
from clip_jax.preprocess import Preprocess
from clip_jax.sharding import AXES, shard_batch
from clip_jax.tokenizer import EOT, SOT
from clip_jax.training.gradients import make_gradients
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


def mesh_of(*shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 3, devices=devices)


def run(mesh, steps, optimizer=OPTIMIZER, model=None, gradients=None, ema=False, **options):
    """The last state, and metrics and state of every step."""
    model = model or abstract_model(CONFIG)
    target = abstract_state(model, optimizer, mesh, ema)
    state = initial_state(CONFIG, optimizer, target, seed=3)
    gradients = make_gradients(model, PREPROCESS, mesh, **(gradients or {}))
    step = make_train_step(gradients, optimizer, schedule, target, **options)
    history, states = [], [jax.device_get(state)]
    for number in range(steps):
        state, metrics = step(state, shard_batch(batch(number), mesh))
        history.append(jax.device_get(metrics))
        states.append(jax.device_get(state))
    assert step._cache_size() == 1  # it compiled once
    return state, history, states


@pytest.fixture(
    scope="module",
    params=[(1, 1, 1), (8, 1, 1), (4, 2, 1), (2, 2, 2)],
    ids=["1 device", "8 data", "4 data x 2 fsdp", "2 x 2 x 2"],
)
def result(request):
    """A mesh, and what 20 steps on it gave."""
    mesh = mesh_of(*request.param)
    return mesh, *run(mesh, steps=20)


def plain_run(steps=20):
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

    value_and_gradients = jax.jit(jax.value_and_grad(loss_of))
    history, states = [], []
    for number in range(steps):
        loss, gradients = value_and_gradients(params, batch(number))
        updates, opt_state = OPTIMIZER.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        history.append((float(loss), float(optax.tree.norm(gradients))))
        states.append(params)
    return history, states


@pytest.fixture(scope="module")
def plain():
    return plain_run()


def test_losses_gradients_and_weights_equal_the_plain_step_on_every_mesh(result, plain):
    _, last, history, states = result
    expected, expected_states = plain
    losses = [metrics["loss"] for metrics in history]
    np.testing.assert_allclose(losses, [loss for loss, _ in expected], rtol=2e-4)
    assert losses[-1] < losses[0]
    for found, (loss, gradient_norm) in zip(history[:5], expected[:5], strict=True):
        assert found["loss"] == pytest.approx(loss, rel=2e-5)
        assert found["gradient_norm"] == pytest.approx(gradient_norm, rel=2e-4)
    assert int(last.step) == 20
    found = jax.tree.leaves_with_path(states[5].params)
    for (path, a), b in zip(found, jax.tree.leaves(expected_states[4]), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("key/bias"):
            continue  # softmax ignores it: its gradient is rounding noise, which Adam blows up
        np.testing.assert_allclose(a, b, atol=3e-4, err_msg=name)


def test_initial_weights_do_not_depend_on_the_mesh(mesh):
    model = abstract_model(CONFIG)
    alone, spread = (
        initial_state(CONFIG, OPTIMIZER, abstract_state(model, OPTIMIZER, each), seed=3).params
        for each in (mesh_of(1, 1, 1), mesh)
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(alone), jax.device_get(spread))


def test_the_state_stays_where_the_rules_put_it_moments_with_their_parameters(result):
    mesh, state, *_ = result
    target = abstract_state(abstract_model(CONFIG), OPTIMIZER, mesh)
    moved = jax.tree.map(
        lambda x, shape: not x.sharding.is_equivalent_to(shape.sharding, x.ndim), state, target
    )
    assert not any(jax.tree.leaves(moved))
    share = mesh.shape["fsdp"] * mesh.shape["tensor"]
    for tree in (state.params, state.opt_state[0].mu, state.opt_state[0].nu):
        kernel = tree["visual"]["transformer"]["blocks"]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size / share


def test_the_log_has_the_scale_that_is_learned_and_the_rate_that_is_applied(result):
    _, _, history, _ = result
    scales = [float(metrics["logit_scale"]) for metrics in history]
    assert scales[0] == pytest.approx(1 / 0.07, rel=1e-5)
    assert len(set(scales)) == len(scales)
    for step, metrics in enumerate(history):
        assert metrics["learning_rate"] == pytest.approx(schedule(step))


def test_the_logit_scale_never_passes_the_cap():
    capped, history, _ = run(mesh_of(1, 1, 1), steps=5, max_logit_scale=10.0)
    assert float(jnp.exp(capped.params["logit_scale"])) <= 10.0 * (1 + 1e-6)
    assert all(metrics["logit_scale"] <= 10.0 * (1 + 1e-6) for metrics in history[1:])


@pytest.mark.slow
def test_half_precision_weights_and_moments_track_float32_and_the_average_follows():
    """The paper's ways to save memory, with averaged weights and accumulation, on a full mesh."""
    config = default_config().optim
    config.update(moment_dtype="bfloat16", bfloat16_weights=("^text/",), weight_decay=0.2)
    model = abstract_model(CONFIG, bfloat16_weights=config.bfloat16_weights)
    optimizer = make_optimizer(config, schedule)
    mesh, decay = mesh_of(2, 2, 2), 0.3
    state, history, states = run(
        mesh, 12, optimizer, model, {"accumulate": 2}, ema=True, ema_decay=decay
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params["text"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params["visual"])} == {"float32"}
    exact = make_optimizer(default_config().optim, schedule)
    _, expected, _ = run(mesh_of(1, 1, 1), 12, exact)
    found = [float(metrics["loss"]) for metrics in history]
    np.testing.assert_allclose(found, [float(each["loss"]) for each in expected], rtol=0.02)

    average = states[0].params["visual"]["projection"]
    for step, each in enumerate(states[1:]):
        kept = min(decay, (1 + step) / (10 + step))
        average = kept * average + (1 - kept) * each.params["visual"]["projection"]
        np.testing.assert_allclose(each.ema["visual"]["projection"], average, rtol=1e-5, atol=1e-7)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.ema)} == {"float32"}
    assert state.best_params is state.ema
