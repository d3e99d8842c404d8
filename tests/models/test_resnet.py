"""The ResNets: an independent NumPy implementation, and batch statistics wherever the rows lie."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.aot.cost import matmul_flops
from clip_jax.aot.hlo import parse
from clip_jax.errors import ConfigError
from clip_jax.models import ResNetConfig, Training
from clip_jax.models.resnet import BatchNorm, Conv, ModifiedResNet, Stage
from clip_jax.models.rows import rows_lie
from tests.models.seeded import seeded

TINY = ResNetConfig(image_size=64, width=8, layers=(1, 1, 1, 3), heads=4)


def tower(config=TINY, dtype=jnp.float32):
    return seeded(
        lambda: ModifiedResNet(config, 12, dtype=dtype, remat="none", unroll=1, rngs=nnx.Rngs(0))
    )


def images(count=4, seed=7):
    return jax.random.normal(jax.random.key(seed), (count, 64, 64, 3))


def arrays(model, kind):
    return nnx.to_pure_dict(nnx.state(model, kind))


@functools.partial(jax.jit, static_argnames="training")
def apply(model, x, training):
    """Embeddings, last feature map, and the running statistics afterwards."""
    found = model(x, training)
    stats = arrays(model, nnx.BatchStat)
    return found, model.features(x), stats


class Reference:
    """The forward pass in float64 NumPy, written from the paper and the released code."""

    def __init__(self, model, training):
        self.params = jax.tree.map(np.float64, arrays(model, nnx.Param))
        self.stats = jax.tree.map(np.float64, arrays(model, nnx.BatchStat))
        self.training = training
        self.config = model.config

    def conv(self, x, kernel, stride=1):
        size, pad = kernel.shape[0], kernel.shape[0] // 2
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        side = (x.shape[1] - size) // stride + 1
        out = np.zeros((len(x), side, side, kernel.shape[3]))
        for row in range(side):
            for column in range(side):
                top, left = row * stride, column * stride
                patch = x[:, top : top + size, left : left + size]
                out[:, row, column] = np.einsum("bhwi,hwio->bo", patch, kernel)
        return out

    def norm(self, x, p, stats):
        mean, var = stats["mean"], stats["var"]
        if self.training:
            rows = x.reshape(-1, x.shape[-1])
            mean, var = rows.mean(0), rows.var(0)
            stats["mean"][...] = 0.9 * stats["mean"] + 0.1 * mean
            stats["var"][...] = 0.9 * stats["var"] + 0.1 * rows.var(0, ddof=1)
        return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]

    @staticmethod
    def halve(x):
        return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4

    def block(self, x, p, stats, stride):
        y = x
        for number in (1, 2):
            y = self.conv(y, p[f"conv{number}"]["kernel"])
            y = np.maximum(self.norm(y, p[f"bn{number}"], stats[f"bn{number}"]), 0)
        y = self.halve(y) if stride == 2 else y
        y = self.norm(self.conv(y, p["conv3"]["kernel"]), p["bn3"], stats["bn3"])
        if "downsample_conv" in p:
            x = self.halve(x) if stride == 2 else x
            x = self.conv(x, p["downsample_conv"]["kernel"])
            x = self.norm(x, p["downsample_bn"], stats["downsample_bn"])
        return np.maximum(x + y, 0)

    def __call__(self, images):
        p, stats = self.params, self.stats
        x = np.float64(images)
        for number, stride in ((1, 2), (2, 1), (3, 1)):
            x = self.conv(x, p["stem"][f"conv{number}"]["kernel"], stride)
            x = np.maximum(self.norm(x, p["stem"][f"bn{number}"], stats["stem"][f"bn{number}"]), 0)
        x = self.halve(x)
        for number, blocks in enumerate(self.config.layers, 1):
            own_p, own_stats = p[f"stage{number}"], stats[f"stage{number}"]
            x = self.block(x, own_p["first"], own_stats["first"], 1 if number == 1 else 2)
            for i in range(blocks - 1):
                x = self.block(
                    x,
                    jax.tree.map(lambda leaf, i=i: leaf[i], own_p["rest"]),
                    jax.tree.map(lambda leaf, i=i: leaf[i], own_stats["rest"]),
                    1,
                )
        return x, self.pool(x)

    def pool(self, x):
        p = self.params["pool"]
        tokens = x.reshape(len(x), -1, x.shape[-1])
        tokens = np.concatenate([tokens.mean(1, keepdims=True), tokens], 1)
        tokens = tokens + p["position_embedding"]
        out = np.zeros((len(x), 12)) + p["out"]["bias"]
        for b in range(len(x)):
            for h in range(self.config.heads):
                q, k, v = (
                    tokens[b] @ p[name]["kernel"][:, h] + p[name]["bias"][h]
                    for name in ("query", "key", "value")
                )
                scores = q[0] @ k.T / np.sqrt(k.shape[1])
                weights = np.exp(scores - scores.max())
                out[b] += weights @ v / weights.sum() @ p["out"]["kernel"][h]
        return out


@pytest.mark.parametrize("training", [None, Training()], ids=["inference", "training"])
def test_the_tower_and_its_running_statistics_equal_the_numpy_reference(training):
    model = tower()
    reference = Reference(model, training is not None)
    expected_map, expected = reference(images())
    with jax.default_matmul_precision("highest"):
        found, found_map, stats = apply(model, images(), training)
    if training is None:
        scale = np.abs(expected_map).max()
        np.testing.assert_allclose(found_map, expected_map, atol=1e-6 * scale)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        stats,
        reference.stats,
    )


def test_layers_are_the_stages_and_the_last_map_is_a_32nd_of_the_image():
    model = tower()

    def features(layer):
        return jax.eval_shape(lambda: model.features(images(), layer))

    shapes = [features(layer).shape for layer in range(5)]
    assert shapes == [
        (4, 16, 16, 8),
        (4, 16, 16, 32),
        (4, 8, 8, 64),
        (4, 4, 4, 128),
        (4, 2, 2, 256),
    ]
    assert [features(layer).shape for layer in range(-5, 0)] == shapes
    with pytest.raises(ValueError, match="layer 5: expected -5 to 4"):
        model.features(images(), 5)
    with pytest.raises(ValueError, match="no final norm"):
        model.features(images(), final_norm=True)


def stage(remat="none", unroll=1, blocks=3):
    """The first block, and two that a scan runs over."""
    options = {"dtype": jnp.float32, "remat": remat, "unroll": unroll}
    model = seeded(lambda: Stage(8, 4, blocks, 2, **options, rngs=nnx.Rngs(0)))
    return nnx.graphdef(model), arrays(model, nnx.Param), arrays(model, nnx.BatchStat)


def loss_and_stats(graphdef, params, stats, x, training):
    def loss_of(params):
        model = nnx.merge(graphdef, params, stats)
        return jnp.mean(model(x, training) ** 2), arrays(model, nnx.BatchStat)

    (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
    return loss, stats, gradients


@pytest.mark.parametrize("style", ["jit", "shard_map"])
def test_statistics_and_gradients_over_eight_devices_are_those_of_the_whole_batch(style):
    graphdef, params, stats = stage()
    x = jax.random.normal(jax.random.key(0), (16, 4, 4, 8))
    whole = functools.partial(loss_and_stats, graphdef, training=Training())
    expected = jax.jit(whole)(params, stats, x)

    axes = ("data", "fsdp")
    mesh = jax.make_mesh((4, 2), axes, axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def own_rows(params, stats, x):
        varying = jax.lax.pcast(params, axes, to="varying")
        training = Training(axis_names=axes)
        loss, stats, gradients = loss_and_stats(graphdef, varying, stats, x, training)
        return jax.lax.pmean(loss, axes), stats, jax.lax.pmean(gradients, axes)

    step = {
        "jit": whole,
        "shard_map": jax.shard_map(
            own_rows, mesh=mesh, in_specs=(P(), P(), P(axes)), out_specs=P()
        ),
    }[style]
    found = jax.jit(step)(params, stats, jax.device_put(x, NamedSharding(mesh, P(axes))))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), found, expected
    )


def test_a_convolution_marks_the_rows_that_it_takes_and_gives():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    conv = Conv(3, 4, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    with rows_lie(8, lambda axes: NamedSharding(mesh, P("data", *[P.UNCONSTRAINED] * (axes - 1)))):
        traced = jax.make_jaxpr(conv)(jnp.ones((8, 4, 4, 3)))
    marked = [each.primitive.name for each in traced.eqns].count("sharding_constraint")
    assert marked == 2


def test_the_variance_keeps_its_digits_when_the_mean_is_large():
    x = 1000 + jax.random.normal(jax.random.key(0), (16, 4, 4, 3))
    norm = BatchNorm(3, rngs=nnx.Rngs(0))
    norm.mean[...] = jnp.full(3, 999.0)  # where training has brought it
    found = norm(x, Training())
    exact = np.float64(x)
    expected = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_frozen_norm_uses_and_keeps_its_running_statistics_in_training():
    norm = BatchNorm(3, rngs=nnx.Rngs(0))
    norm.use_running_average = True
    x = 5 + jax.random.normal(jax.random.key(0), (4, 2, 2, 3))
    np.testing.assert_allclose(norm(x, Training()), x / np.sqrt(1 + 1e-5), rtol=1e-6)
    np.testing.assert_array_equal(norm.mean[...], np.zeros(3))
    np.testing.assert_array_equal(norm.var[...], np.ones(3))


def test_remat_and_unroll_change_neither_gradients_nor_statistics():
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 8))

    def run(remat, unroll):
        graphdef, params, stats = stage(remat, unroll)
        return jax.jit(functools.partial(loss_and_stats, graphdef, training=Training()))(
            params, stats, x
        )

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        run("none", 1),
        run("full", 2),
    )


def test_a_block_outside_of_a_loop_is_recomputed_too():
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 8))

    def flops(remat):
        graphdef, *variables = stage(remat, blocks=1)
        run = functools.partial(loss_and_stats, graphdef, training=Training())
        return matmul_flops(parse(jax.jit(run).lower(*variables, x).compile().as_text()))

    # The compiler finds what it has computed before: without barriers it would keep all of it.
    assert flops("full") > 1.2 * flops("none")


def test_bfloat16_keeps_statistics_in_float32_and_close():
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 16))
    norm = seeded(lambda: BatchNorm(16, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(norm)
    exact = norm(x, Training())
    half = nnx.merge(graphdef, state)
    found = half(x.astype(jnp.bfloat16), Training())
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found), exact, atol=0.05)
    assert half.mean.dtype == half.var.dtype == jnp.float32
    np.testing.assert_allclose(half.var[...], norm.var[...], rtol=1e-2)


def test_initial_weights_follow_the_released_code():
    config = ResNetConfig(image_size=64, width=32, layers=(1, 2, 1, 1), heads=16)
    model = ModifiedResNet(config, 64, dtype=jnp.float32, remat="none", unroll=1, rngs=nnx.Rngs(0))
    params = arrays(model, nnx.Param)
    uniform, width = 3**-0.5, 32 * 32

    def std(x):
        return float(jnp.std(x))

    pool, rest = params["pool"], params["stage2"]["rest"]
    for name, (found, wanted) in {
        "stem": (std(params["stem"]["conv3"]["kernel"]), uniform * (9 * 16) ** -0.5),
        "3x3": (std(rest["conv2"]["kernel"]), uniform * (9 * 64) ** -0.5),
        "1x1": (std(rest["conv3"]["kernel"]), uniform * 64**-0.5),
        "pool query": (std(pool["query"]["kernel"]), width**-0.5),
        "pool out": (std(pool["out"]["kernel"]), width**-0.5),
        "pool bias": (std(pool["key"]["bias"]), uniform * width**-0.5),
        "pool positions": (std(pool["position_embedding"]), width**-0.5),
    }.items():
        assert found == pytest.approx(wanted, rel=0.1), name
    assert not np.any(rest["bn3"]["scale"])
    assert not np.any(params["stage1"]["first"]["bn3"]["scale"])
    assert np.all(params["stage1"]["first"]["downsample_bn"]["scale"] == 1)
    assert np.all(rest["bn2"]["scale"] == 1)
    assert math.prod(pool["position_embedding"].shape) == 5 * width


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 80}, "80 pixels is not a multiple of 32"),
        ({"heads": 3}, "3 heads divide 256 features"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        tower(dataclasses.replace(TINY, **change))
