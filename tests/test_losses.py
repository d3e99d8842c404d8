"""The sharded loss against an oracle written with none of its code, in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from clip_jax.losses import softmax_loss
from clip_jax.sharding import BATCH_AXES


def oracle(image, text, scale):
    """Loss and gradients by the textbook, from the whole N x N matrix in float64."""
    image, text = np.float64(image), np.float64(text)
    count = len(image)
    logits = scale * image @ text.T
    by_image = np.exp(logits - logits.max(1, keepdims=True))
    by_image /= by_image.sum(1, keepdims=True)
    by_text = np.exp(logits - logits.max(0, keepdims=True))
    by_text /= by_text.sum(0, keepdims=True)
    loss = -(np.log(np.diag(by_image)) + np.log(np.diag(by_text))).mean() / 2
    d_logits = ((by_image + by_text) / 2 - np.eye(count)) / count
    return loss, (
        scale * d_logits @ text,
        scale * d_logits.T @ image,
        (d_logits * (image @ text.T)).sum(),
    )


def unit(key, rows, features=32):
    x = jax.random.normal(jax.random.key(key), (rows, features))
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def value_and_gradients(mesh, image, text, scale):
    loss = jax.shard_map(
        lambda image, text, scale: softmax_loss(image, text, scale, BATCH_AXES),
        mesh=mesh,
        in_specs=(P(BATCH_AXES), P(BATCH_AXES), P()),
        out_specs=P(),
    )
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(image, text, jnp.float32(scale))


def relative(found, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("rows", [8, 40])  # one row a device, and several
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_value_and_gradients_equal_the_oracle_on_every_mesh(mesh, rows, scale):
    image, text = unit(0, rows), unit(1, rows)
    loss, gradients = value_and_gradients(mesh, image, text, scale)
    expected_loss, expected_gradients = oracle(image, text, scale)
    assert relative(loss, expected_loss) < 1e-6
    for found, expected in zip(gradients, expected_gradients, strict=True):
        assert relative(found, expected) < 2e-6


def test_without_axes_it_is_the_loss_of_one_device():
    image, text = unit(0, 12), unit(1, 12)
    loss, gradients = jax.value_and_grad(softmax_loss, argnums=(0, 1, 2))(
        image, text, jnp.float32(20)
    )
    expected_loss, expected_gradients = oracle(image, text, 20.0)
    assert relative(loss, expected_loss) < 1e-6
    for found, expected in zip(gradients, expected_gradients, strict=True):
        assert relative(found, expected) < 2e-6


def test_the_cotangent_scales_the_gradients():
    image, text, scale = unit(0, 12), unit(1, 12), jnp.float32(20)
    once = jax.grad(softmax_loss, argnums=(0, 1, 2))(image, text, scale)
    thrice = jax.grad(lambda *args: 3 * softmax_loss(*args), argnums=(0, 1, 2))(image, text, scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(3 * a, b, rtol=1e-6), once, thrice)


def test_logits_of_bfloat16_embeddings_are_float32(mesh):
    # At scale 100, bfloat16 logits would be 0.5 apart and the loss far from the oracle's.
    image, text = unit(0, 40).astype(jnp.bfloat16), unit(1, 40).astype(jnp.bfloat16)
    loss, gradients = value_and_gradients(mesh, image, text, 100.0)
    expected_loss, expected_gradients = oracle(
        image.astype(jnp.float32), text.astype(jnp.float32), 100.0
    )
    assert loss.dtype == jnp.float32
    assert relative(loss, expected_loss) < 1e-6
    assert gradients[0].dtype == jnp.bfloat16  # one rounding of the exact gradient: 2^-8
    assert relative(gradients[0], expected_gradients[0]) < 2**-8
    assert relative(gradients[1], expected_gradients[1]) < 2**-8
    assert relative(gradients[2], expected_gradients[2]) < 2e-6


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equal_embeddings_give_log_n_and_finite_gradients(mesh, scale):
    same = jnp.broadcast_to(unit(0, 1), (16, 32))
    loss, gradients = value_and_gradients(mesh, same, same, scale)
    np.testing.assert_allclose(loss, np.log(16), rtol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_duplicates_among_the_pairs_equal_the_oracle(mesh):
    image = jnp.concatenate([unit(0, 8), unit(0, 8)])
    text = jnp.concatenate([unit(1, 8), unit(1, 8)])
    loss, gradients = value_and_gradients(mesh, image, text, 100.0)
    expected_loss, expected_gradients = oracle(image, text, 100.0)
    assert relative(loss, expected_loss) < 1e-6
    for found, expected in zip(gradients, expected_gradients, strict=True):
        assert relative(found, expected) < 2e-6


def test_no_device_holds_the_n_by_n_matrix():
    # 8 devices, 16 rows each: 128 x 128 must not appear in the program, 16 x 128 must.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    loss = jax.shard_map(
        lambda image, text, scale: softmax_loss(image, text, scale, ("data",)),
        mesh=mesh,
        in_specs=(P("data"), P("data"), P()),
        out_specs=P(),
    )
    arguments = (unit(0, 128), unit(1, 128), jnp.float32(10))
    program = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arguments).compile().as_text()
    assert "f32[16,128]" in program
    assert "[128,128]" not in program
