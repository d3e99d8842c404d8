"""Gradients of weights, float32 whatever the towers compute in; attention in groups of rows."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.models import layers
from clip_jax.models.layers import Attention, AttentionInit, matmul, normal, rows_lie
from clip_jax.models.text import TextConfig, TextTransformer

DRAWN = np.random.default_rng(0)


def drawn(*shape, dtype=jnp.float32):
    return jnp.asarray(DRAWN.normal(size=shape), dtype)


def test_the_gradient_by_a_kernel_is_not_rounded_to_the_compute_dtype():
    rows, kernel = drawn(64, 16, dtype=jnp.bfloat16), drawn(16, 8)
    cotangent = drawn(64, 8, dtype=jnp.bfloat16)
    product, backward = jax.vjp(matmul, rows, kernel)
    by_rows, by_kernel = backward(cotangent)
    assert (product.dtype, by_rows.dtype, by_kernel.dtype) == ("bfloat16", "bfloat16", "float32")
    exact = np.float64(rows).T @ np.float64(cotangent)
    np.testing.assert_allclose(by_kernel, exact, rtol=1e-5, atol=1e-5)
    rounded = np.float64(kernel.astype(jnp.bfloat16))
    np.testing.assert_allclose(product, np.float64(rows) @ rounded, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(by_rows, np.float64(cotangent) @ rounded.T, rtol=1e-2, atol=1e-2)


def test_the_gradient_by_a_token_is_the_sum_of_all_texts():
    config = TextConfig(width=16, heads=2, layers=1, context_length=4, vocab_size=8)
    tower = TextTransformer(config, 8, dtype=jnp.bfloat16, remat="none", unroll=1, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(tower)
    tokens = np.tile(np.int32([5, 1, 2, 7]), (4096, 1))

    def total(params):
        return nnx.merge(graphdef, params).features(tokens, layer=0).sum(dtype="float32")

    # In bfloat16 they would add up to 256, and stay there.
    found = jax.jit(jax.grad(total))(params)["token_embedding"][...]
    np.testing.assert_array_equal(found[tokens[0]], np.full((4, 16), 4096))


def total_and_gradients(attention, x, mesh=None):
    """Of what it finds, each number with a weight of its own, by the weights and the input."""
    graphdef, params = nnx.split(attention)
    each = np.random.default_rng(1).normal(size=x.shape).astype("float32")

    def total(params, x):
        with contextlib.nullcontext() if mesh is None else on_mesh(mesh):
            return (nnx.merge(graphdef, params)(x) * each).sum()

    return jax.jit(jax.value_and_grad(total, (0, 1)))(params, x)


def on_mesh(mesh):
    rows = ("data", "fsdp")
    return rows_lie(
        mesh.shape["data"] * mesh.shape["fsdp"],
        lambda axes: NamedSharding(mesh, P(rows, *[P.UNCONSTRAINED] * (axes - 1))),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_groups_is_attention(mesh, causal, monkeypatch):
    attention = Attention(
        8, 2, init=AttentionInit(normal(0.3), normal(0.3)), causal=causal, dtype="float32",
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    x = drawn(48, 5, 8)
    expected = total_and_gradients(attention, x)
    monkeypatch.setattr(layers, "SCORES_AT_ONCE", 2 * 2 * 5 * 5 * 4)  # of two rows
    x = jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
    found = total_and_gradients(attention, x, mesh)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4), found, expected
    )


def test_attention_computes_no_more_scores_at_once_than_it_may(monkeypatch):
    attention = Attention(
        8, 2, init=AttentionInit(normal(0.3), normal(0.3)), dtype="float32", rngs=nnx.Rngs(0)
    )
    monkeypatch.setattr(layers, "SCORES_AT_ONCE", 2 * 2 * 5 * 5 * 4)

    def shapes(devices=None):
        with rows_lie(devices) if devices else contextlib.nullcontext():
            return str(jax.make_jaxpr(lambda x: attention(x))(jnp.ones((48, 5, 8))))

    assert "[1,2,2,5,5]" in shapes(1)
    assert "[1,16,2,5,5]" in shapes(8)  # each has two of them
    assert "[1,48,2,5,5]" in shapes()
    for devices in (1, 8):
        assert "[1,48,2,5,5]" not in shapes(devices)
