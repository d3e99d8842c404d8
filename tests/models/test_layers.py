"""Layer normalisation and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.layers import layer_norm

EPSILON = 1e-5


def drawn(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(2, 3, shape), dtype)


def operands(dtype):
    return drawn(4, 3, 16, dtype=dtype), drawn(16, seed=1), drawn(16, seed=2)


def defined(x, scale, bias):
    """As the paper by Ba et al. (2016) has it, for JAX to differentiate."""
    centered = x - x.mean(-1, keepdims=True)
    return centered / jnp.sqrt((centered**2).mean(-1, keepdims=True) + EPSILON) * scale + bias


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 2e-2)])
def test_layer_norm_and_its_gradients_are_those_of_the_definition(dtype, tolerance):
    x, scale, bias = operands(dtype)
    cotangent = drawn(*x.shape, seed=3, dtype=dtype)
    found, backward = jax.vjp(lambda *of: layer_norm(*of, EPSILON), x, scale, bias)
    exact = x.astype("float32"), scale, bias
    expected, exact_backward = jax.vjp(defined, *exact)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype("float32"), expected, rtol=tolerance, atol=tolerance)
    pairs = zip(
        backward(cotangent),
        exact_backward(cotangent.astype("float32")),
        (dtype, "float32", "float32"),
        strict=True,
    )
    for by, exactly_by, expected_dtype in pairs:
        assert by.dtype == expected_dtype
        error = jnp.linalg.norm(by.astype("float32") - exactly_by) / jnp.linalg.norm(exactly_by)
        assert error < tolerance


def test_its_backward_pass_keeps_x_and_two_numbers_a_row():
    _, backward = jax.vjp(lambda *of: layer_norm(*of, EPSILON), *operands("bfloat16"))
    kept = sorted((x.dtype.name, x.shape) for x in jax.tree.leaves(backward))
    assert kept == [
        ("bfloat16", (4, 3, 16)),
        ("float32", (4, 3, 1)),
        ("float32", (4, 3, 1)),
        ("float32", (16,)),
    ]


def test_it_takes_the_weights_of_a_model_that_was_loaded_and_not_moved_to_a_device():
    x, scale, bias = operands("float32")
    found = layer_norm(x, np.asarray(scale), np.asarray(bias), EPSILON)
    np.testing.assert_array_equal(found, layer_norm(x, scale, bias, EPSILON))
