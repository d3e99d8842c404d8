import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clip_jax.config import default_config
from clip_jax.errors import ConfigError
from clip_jax.models import CLIP, model_config
from clip_jax.optim import (
    DIRECTIONS,
    decay_mask,
    layer_factors,
    learning_rate_schedule,
    make_optimizer,
)
from clip_jax.rounding import apply_updates, stochastic_round


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


def settings(**changes):
    config = default_config().optim
    config.update(**changes)
    return config


def blocks(layers=3, width=8, hidden=12):
    """A small tower's worth of parameters, with the paths that the rules look for."""
    normal = np.random.default_rng(0).standard_normal
    shapes = {
        "query": (layers, width, 2, width // 2),
        "out": (layers, 2, width // 2, width),
        "up": (layers, width, hidden),
    }
    array = {name: jnp.float32(normal(shape)) for name, shape in shapes.items()}
    return {
        "patch_embedding": {"kernel": jnp.float32(normal((6, width)))},
        "transformer": {
            "blocks": {
                "attention": {
                    "query": {"kernel": array["query"]},
                    "out": {"kernel": array["out"]},
                },
                "mlp": {"up": {"kernel": array["up"], "bias": jnp.zeros((layers, hidden))}},
            }
        },
        "projection": jnp.float32(normal((width, 5))),
    }


def gradients_like(params, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.float32(random.standard_normal(x.shape)), params)


def moments_of(state, params):
    """Arrays of the optimizer's state that have the shape of a parameter."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    return [leaf for leaf in jax.tree.leaves(state) if leaf.shape in shapes]


def test_lion_steps_by_the_sign_of_the_mixed_gradient():
    config = settings(name="lion", beta1=0.9, beta2=0.98, weight_decay=0.5)
    optimizer = make_optimizer(config, lambda step: 0.01)
    params = {"kernel": jnp.array([1.0, -2.0, 0.5])}
    state, mean = optimizer.init(params), np.zeros(3)
    for step in range(5):
        gradient = np.random.default_rng(step).standard_normal(3)
        updates, state = optimizer.update({"kernel": jnp.float32(gradient)}, state, params)
        direction = np.sign(0.9 * mean + 0.1 * gradient) + 0.5 * np.float64(params["kernel"])
        np.testing.assert_allclose(updates["kernel"], -0.01 * direction, rtol=1e-5)
        mean = 0.98 * mean + 0.02 * gradient


def test_muon_orthogonalizes_each_layers_matrix_and_steps_as_far_as_adamw():
    optimizer = make_optimizer(settings(name="muon", weight_decay=0.0), lambda step: 1.0)
    params = {"visual": blocks()}
    updates, _ = optimizer.update(gradients_like(params, 1), optimizer.init(params), params)
    inside = updates["visual"]["transformer"]["blocks"]
    matrices = {
        "query": np.reshape(inside["attention"]["query"]["kernel"], (3, 8, 8)),
        "out": np.reshape(inside["attention"]["out"]["kernel"], (3, 8, 8)),
        "up": np.asarray(inside["mlp"]["up"]["kernel"]),
    }
    for name, layers in matrices.items():
        for matrix in layers:  # five Newton-Schulz turns bring singular values to about 1
            values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
            assert values.min() > 0.3, name
            assert values.max() < 1.3, name
            assert 0.1 < np.sqrt(np.mean(matrix**2)) < 0.3  # AdamW's is about 0.2 to 0.4
    # All else is Adam's, whose first step is equally long everywhere.
    steps = np.abs(updates["visual"]["projection"])
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-3)


def test_adafactor_keeps_rows_and_columns_instead_of_second_moments():
    wide = {"mlp": jnp.ones((256, 512)), "bias": jnp.ones(512)}
    optimizer = make_optimizer(settings(name="adafactor", weight_decay=0.0), lambda step: 0.1)
    state = optimizer.init(wide)
    floats = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32)
    assert floats < 1.02 * (wide["mlp"].size + 2 * wide["bias"].size)  # the first moment, and bits
    gradient = np.random.default_rng(0).standard_normal((256, 512))
    updates, _ = optimizer.update(
        {"mlp": jnp.float32(gradient), "bias": jnp.ones(512)}, state, wide
    )
    square = gradient**2
    estimate = np.outer(square.mean(1), square.mean(0)) / square.mean()
    direction = gradient / np.sqrt(estimate)
    direction /= max(1, np.sqrt(np.mean(direction**2)))
    np.testing.assert_allclose(updates["mlp"], -0.1 * 0.1 * direction, rtol=1e-4)  # 1 - beta1


def test_an_unknown_optimizer_or_dtype_is_answered_with_the_choices():
    with pytest.raises(ConfigError, match="'sgd': choose one of adamw, lion, muon, adafactor"):
        make_optimizer(settings(name="sgd"), lambda step: 1.0)
    with pytest.raises(ConfigError, match="moment_dtype='float16': float32 or bfloat16"):
        make_optimizer(settings(moment_dtype="float16"), lambda step: 1.0)


def test_gradients_are_clipped_to_their_global_norm_without_the_frozen():
    config = settings(name="lion", beta1=0.0, beta2=0.0, clip_norm=1.0, weight_decay=0.0)
    config.frozen = ("^text/",)
    params = {"visual": {"kernel": jnp.zeros(4)}, "text": {"kernel": jnp.zeros(4)}}
    gradients = {"visual": {"kernel": jnp.full(4, 3.0)}, "text": {"kernel": jnp.full(4, 100.0)}}
    optimizer = make_optimizer(config, lambda step: 1.0)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    (moment,) = moments_of(state, params)  # with beta2 = 0, the clipped gradient itself
    np.testing.assert_allclose(moment, 0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["text"]["kernel"], 0)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_frozen_tower_has_no_moments(name):
    params = {"visual": blocks(), "text": blocks()}
    config = settings(name=name)
    whole = make_optimizer(config, lambda step: 1.0).init(params)
    config.frozen = ("^visual/",)
    half = make_optimizer(config, lambda step: 1.0).init(params)
    size = [sum(leaf.size for leaf in moments_of(state, params)) for state in (whole, half)]
    assert size[1] == size[0] / 2 > 0


def test_layers_near_the_input_learn_more_slowly():
    factors = layer_factors({"visual": blocks(layers=3)}, 0.5)["visual"]
    kernel = factors["transformer"]["blocks"]["attention"]["query"]["kernel"]
    np.testing.assert_allclose(np.ravel(kernel), [1 / 8, 1 / 4, 1 / 2])
    assert kernel.shape == (3, 1, 1, 1)
    assert factors["patch_embedding"]["kernel"] == 1 / 16
    assert factors["projection"] == 1
    resnet = {"stem": {"conv1": 0}, "stage1": {"a": 0}, "stage4": {"a": 0}, "pool": {"q": 0}}
    arrays = jax.tree.map(jnp.float32, {"visual": resnet, "logit_scale": 0})
    factors = layer_factors(arrays, 0.5)
    assert factors["visual"] == {
        "stem": {"conv1": 1 / 32},
        "stage1": {"a": 1 / 16},
        "stage4": {"a": 1 / 2},
        "pool": {"q": 1},
    }
    assert factors["logit_scale"] == 1


def test_the_layer_factors_scale_the_updates_and_nothing_else():
    params = {"visual": blocks()}
    gradients = gradients_like(params, 1)
    plain, scaled = (
        make_optimizer(settings(layer_decay=decay), lambda step: 1.0) for decay in (1.0, 0.5)
    )
    updates, _ = plain.update(gradients, plain.init(params), params)
    found, _ = scaled.update(gradients, scaled.init(params), params)
    factors = layer_factors(params, 0.5)
    jax.tree.map(
        lambda found, update, factor: np.testing.assert_allclose(found, update * factor, rtol=1e-6),
        found,
        updates,
        factors,
    )


def test_stochastic_rounding_goes_to_the_neighbours_and_is_unbiased():
    random = np.random.default_rng(0)
    x = jnp.float32(random.standard_normal(50) * 10.0 ** random.integers(-20, 20, 50))
    draws = np.stack(
        [np.float64(stochastic_round(x, jax.random.key(seed))) for seed in range(2000)]
    )
    exact = np.float64(x)
    unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)  # bfloat16 has 8 bits of significand
    below = np.floor(exact / unit) * unit
    assert set(np.unique(np.round((draws - below) / unit))) == {0, 1}
    assert np.abs(draws - exact).max(axis=0) == pytest.approx(
        np.maximum(exact - below, below + unit - exact), rel=1e-6
    )
    # The mean of 2,000 draws is within five standard errors of the exact value.
    assert (np.abs(draws.mean(0) - exact) / unit).max() < 5 * 0.5 / np.sqrt(2000)
    special = jnp.array([0.0, -0.0, 1.0, -2.5, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(
        np.float32(stochastic_round(special, jax.random.key(0))), np.float32(special)
    )


def test_steps_too_small_for_bfloat16_add_up():
    param = {"kernel": jnp.ones(4096, jnp.bfloat16)}
    step = {"kernel": jnp.full(4096, 2.0**-12)}  # a thirty-second of the spacing at 1
    apply = jax.jit(apply_updates)
    for number in range(256):
        param = apply(param, step, jax.random.key(number))
    assert param["kernel"].dtype == jnp.bfloat16
    assert np.float64(param["kernel"]).mean() == pytest.approx(1 + 256 * 2**-12, abs=2e-3)
    assert float(jnp.bfloat16(1) + jnp.bfloat16(2**-12)) == 1  # rounded to nearest, they do not


def test_bfloat16_moments_take_half_the_memory_and_follow_the_exact_ones():
    params = {"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(64)}
    config = settings(beta2=0.999)  # a step changes the second moment by a thousandth: below 2^-9
    exact = make_optimizer(config, lambda step: 1.0)
    config = settings(beta2=0.999, moment_dtype="bfloat16")
    half = make_optimizer(config, lambda step: 1.0)
    states = [exact.init(params), half.init(params)]
    updates = [jax.jit(optimizer.update) for optimizer in (exact, half)]
    for number in range(300):
        gradients = gradients_like(params, number)
        found = []
        for index in range(2):
            each, states[index] = updates[index](gradients, states[index], params)
            found.append(each)
    moments = [moments_of(state, params) for state in states]
    assert [leaf.dtype for leaf in moments[0]] == [jnp.float32] * 4
    assert [leaf.dtype for leaf in moments[1]] == [jnp.bfloat16] * 4
    second = [np.float64(state[-2]).mean() for state in moments]
    assert second[1] == pytest.approx(second[0], rel=5e-3)
    exact_step, half_step = (np.float64(each["kernel"]) for each in found)
    assert np.linalg.norm(half_step - exact_step) < 0.05 * np.linalg.norm(exact_step)
