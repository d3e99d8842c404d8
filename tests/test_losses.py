"""The sharded losses against oracles written with none of their code, in float64 NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.losses import sigmoid_loss, softmax_loss
from clip_jax.sharding import BATCH_AXES, batch_divisor

LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}
COMMUNICATIONS = ("gather", "ring")
BIAS = -3.0


def softmax_oracle(image, text, scale):
    """Loss and gradients by the textbook, from the whole N x N matrix."""
    logits = scale * image @ text.T
    by_image = np.exp(logits - logits.max(1, keepdims=True))
    by_image /= by_image.sum(1, keepdims=True)
    by_text = np.exp(logits - logits.max(0, keepdims=True))
    by_text /= by_text.sum(0, keepdims=True)
    loss = -(np.log(np.diag(by_image)) + np.log(np.diag(by_text))).mean() / 2
    return loss, ((by_image + by_text) / 2 - np.eye(len(image))) / len(image)


def sigmoid_oracle(image, text, scale):
    labels = 2 * np.eye(len(image)) - 1
    signed = labels * (scale * image @ text.T + BIAS)
    loss = np.logaddexp(0, -signed).sum() / len(image)
    return loss, -labels / (1 + np.exp(signed)) / len(image)


def oracle(name, image, text, scale):
    """Loss, gradients by image and text, and terms that sum to those by scale and bias."""
    image, text = np.float64(image), np.float64(text)
    textbook = {"softmax": softmax_oracle, "sigmoid": sigmoid_oracle}[name]
    loss, d_logits = textbook(image, text, scale)
    terms = (d_logits * (image @ text.T), d_logits)
    return loss, scale * d_logits @ text, scale * d_logits.T @ image, terms


def arguments(name, image, text, scale):
    biases = (jnp.float32(BIAS),) if name == "sigmoid" else ()
    return image, text, jnp.float32(scale), *biases


def unit(key, rows, features=32):
    x = jax.random.normal(jax.random.key(key), (rows, features))
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def on_mesh(mesh, name, communication, chunk=None):
    """The jitted value and gradients by every argument."""

    def loss(image, text, *scalars):
        return LOSSES[name](
            image, text, *scalars, axis_names=axes, communication=communication, chunk=chunk
        )

    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    scalars = len(arguments(name, None, None, 1.0)) - 2
    mapped = jax.shard_map(
        loss, mesh=mesh, in_specs=(P(axes), P(axes), *[P()] * scalars), out_specs=P()
    )
    return jax.jit(jax.value_and_grad(mapped, argnums=tuple(range(2 + scalars))))


def relative(found, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


def assert_equals_oracle(found, name, image, text, scale, tolerance=1e-6):
    loss, (by_image, by_text, *by_scalars) = found
    expected, expected_by_image, expected_by_text, terms = oracle(name, image, text, scale)
    assert loss.dtype == jnp.float32
    assert relative(loss, expected) < 1e-6
    assert relative(by_image, expected_by_image) < tolerance
    assert relative(by_text, expected_by_text) < tolerance
    # A scalar's gradient is a sum over pairs in which the matches cancel the rest: the rounding is
    # that of the terms, however small their sum.
    for gradient, term in zip(by_scalars, terms, strict=False):
        assert abs(gradient - term.sum()) < 1e-6 * np.abs(term).sum()


def devices_of(count) -> Mesh:
    return jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count])


@pytest.mark.parametrize("communication", COMMUNICATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_equal_the_oracle_on_every_mesh(mesh, name, communication):
    one_row_a_device = batch_divisor(mesh)
    for rows, chunk in ((one_row_a_device, None), (40, 3)):
        function = on_mesh(mesh, name, communication, chunk)
        image, text = unit(0, rows), unit(1, rows)
        for scale in (1.0, 14.3, 100.0):
            if rows == 1 and name == "softmax":
                continue  # a single pair has nothing to be told from: the loss is zero
            found = function(*arguments(name, image, text, scale))
            # A float32 similarity is rounded by some 1e-8, and the scale multiplies that: with JAX
            # 0.12 the ring's gradients are 1.08e-6 off at scale 100.
            tolerance = max(1e-6, 1.5e-8 * scale)
            assert_equals_oracle(found, name, image, text, scale, tolerance)


@pytest.mark.parametrize("communication", COMMUNICATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_logits_of_bfloat16_embeddings_are_float32(mesh, name, communication):
    # At scale 100, bfloat16 logits would be 0.5 apart and the loss far from the oracle's.
    image, text = unit(0, 40).astype(jnp.bfloat16), unit(1, 40).astype(jnp.bfloat16)
    found = on_mesh(mesh, name, communication)(*arguments(name, image, text, 100.0))
    assert found[1][0].dtype == found[1][1].dtype == jnp.bfloat16
    image, text = image.astype(jnp.float32), text.astype(jnp.float32)
    # The gradients are rounded to bfloat16 once, and P - I before the product.
    assert_equals_oracle(found, name, image, text, 100.0, tolerance=2**-8)


@pytest.mark.parametrize("name", LOSSES)
def test_the_cotangent_scales_the_gradients(name):
    given = arguments(name, unit(0, 12), unit(1, 12), 20.0)
    numbers = tuple(range(len(given)))
    once = jax.grad(LOSSES[name], argnums=numbers)(*given)
    thrice = jax.grad(lambda *args: 3 * LOSSES[name](*args), argnums=numbers)(*given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(3 * a, b, rtol=1e-6), once, thrice)
    assert_equals_oracle((LOSSES[name](*given), once), name, *given[:2], 20.0)


@pytest.mark.parametrize("communication", COMMUNICATIONS)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equal_embeddings_give_log_n_and_finite_gradients(scale, communication):
    same = jnp.broadcast_to(unit(0, 1), (16, 32))
    function = on_mesh(devices_of(8), "softmax", communication)
    loss, gradients = function(*arguments("softmax", same, same, scale))
    np.testing.assert_allclose(loss, np.log(16), rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    function = on_mesh(devices_of(8), "sigmoid", communication)
    loss, gradients = function(*arguments("sigmoid", same, same, scale))
    np.testing.assert_allclose(loss, oracle("sigmoid", same, same, scale)[0], rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("communication", COMMUNICATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_duplicates_among_the_pairs_equal_the_oracle(name, communication):
    image = jnp.concatenate([unit(0, 8), unit(0, 8)])
    text = jnp.concatenate([unit(1, 8), unit(1, 8)])
    function = on_mesh(devices_of(8), name, communication)
    found = function(*arguments(name, image, text, 100.0))
    assert_equals_oracle(found, name, image, text, 100.0)


def collectives(program):
    """Name and result shapes of every collective of a compiled program, each once."""
    pattern = (
        r"= (.*) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
    )
    return [(kind, shape) for shape, kind, _ in re.findall(pattern, program)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("communication", COMMUNICATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_no_device_holds_the_n_by_n_matrix_and_nothing_is_sent_twice(name, communication, dtype):
    # 8 devices, 16 rows each. N x N would be 128 x 128.
    given = arguments(name, unit(0, 128).astype(dtype), unit(1, 128).astype(dtype), 10.0)
    function = on_mesh(devices_of(8), name, communication)
    lowered = function.lower(*given)
    assert "128x128" not in lowered.as_text()  # what we ask for, in the dtypes we ask for
    program = lowered.compile().as_text()
    assert "[128,128]" not in program
    assert ("f32[16,128]" if communication == "gather" else "f32[16,16]") in program
    asked = re.findall(r"stablehlo\.(all_gather|all_reduce|collective_permute)", lowered.as_text())
    expected = {
        # Embeddings of both sides once; the normalizers (peak and total) of both; the scalars.
        ("softmax", "gather"): {"all_gather": 2 + 4, "all_reduce": 1},
        ("sigmoid", "gather"): {"all_gather": 2, "all_reduce": 1},
        # In the body of a loop of seven turns; the second time round with the normalizers.
        ("softmax", "ring"): {"collective_permute": 2 + 2 + 4, "all_reduce": 1},
        ("sigmoid", "ring"): {"collective_permute": 2, "all_reduce": 1},
    }[name, communication]
    assert {kind: asked.count(kind) for kind in set(asked)} == expected
    assert all(
        "[128,32]" not in shape for kind, shape in collectives(program) if kind == "all-reduce"
    )


def test_chunks_bound_the_logits_of_a_single_device():
    given = arguments("softmax", unit(0, 128), unit(1, 128), 10.0)
    program = (
        on_mesh(devices_of(1), "softmax", "gather", chunk=16).lower(*given).compile().as_text()
    )
    assert "f32[128,16]" in program
    assert "[128,128]" not in program


@pytest.mark.slow
@pytest.mark.parametrize("communication", COMMUNICATIONS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.libtpu
def test_a_pod_needs_no_memory_for_the_loss_and_sends_nothing_twice(v5e_pod, name, communication):
    rows, features = 32_768, 512
    mesh = jax.make_mesh((len(v5e_pod),), ("data",), (AxisType.Auto,), devices=v5e_pod)

    def shape(dimensions, dtype, spec):
        return jax.ShapeDtypeStruct(dimensions, dtype, sharding=NamedSharding(mesh, spec))

    embeddings = shape((rows, features), jnp.bfloat16, P("data"))
    scalars = [shape((), jnp.float32, P())] * (len(arguments(name, None, None, 1.0)) - 2)
    compiled = on_mesh(mesh, name, communication).lower(embeddings, embeddings, *scalars).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1e6
    program = compiled.as_text()
    assert f"[{rows},{rows}]" not in program
    for kind, result in collectives(program):
        assert kind != "all-reduce" or f",{features}]" not in result  # normalizers and scalars
        assert communication == "ring" or kind != "collective-permute"
        assert communication == "gather" or kind != "all-gather"
