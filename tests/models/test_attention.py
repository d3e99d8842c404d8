"""Attention in groups of rows is attention."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.models import attention as attention_module
from clip_jax.models.attention import Attention, AttentionInit
from clip_jax.models.layers import normal
from clip_jax.models.rows import rows_lie


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
    x = jax.random.normal(jax.random.key(0), (48, 5, 8))
    expected = total_and_gradients(attention, x)
    monkeypatch.setattr(attention_module, "SCORES_AT_ONCE", 2 * 2 * 5 * 5 * 4)  # of two rows
    x = jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
    found = total_and_gradients(attention, x, mesh)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4), found, expected
    )


def test_attention_computes_no_more_scores_at_once_than_it_may(monkeypatch):
    attention = Attention(
        8, 2, init=AttentionInit(normal(0.3), normal(0.3)), dtype="float32", rngs=nnx.Rngs(0)
    )
    monkeypatch.setattr(attention_module, "SCORES_AT_ONCE", 2 * 2 * 5 * 5 * 4)

    def shapes(devices=None):
        with rows_lie(devices) if devices else contextlib.nullcontext():
            return str(jax.make_jaxpr(lambda x: attention(x))(jnp.ones((48, 5, 8))))

    assert "[1,2,2,5,5]" in shapes(1)
    assert "[1,16,2,5,5]" in shapes(8)  # each has two of them
    assert "[1,48,2,5,5]" in shapes()
    for devices in (1, 8):
        assert "[1,48,2,5,5]" not in shapes(devices)
