"""A tower that is read at one token of each row computes the same, and less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clip_jax.models import attention as attention_module
from clip_jax.models import transformer as transformer_module
from clip_jax.models import unstack
from clip_jax.models.transformer import BlockInit, BlockSpec, Transformer

ROWS, TOKENS, WIDTH = 6, 7, 16
TOKEN_OF_EACH = np.array([0, 6, 3, 1, 2, 5], np.int32)


def transformer(layers=3, causal=False, remat="none"):
    init = BlockInit.torch_default(WIDTH, 4 * WIDTH)
    spec = BlockSpec(WIDTH, 2, 4 * WIDTH, "quick_gelu", 1e-5, init, causal)
    return Transformer(spec, layers, dtype="float32", remat=remat, unroll=1, rngs=nnx.Rngs(0))


def inputs():
    return jax.random.normal(jax.random.key(1), (ROWS, TOKENS, WIDTH))


def at_of_all(model, x, token):
    return model(x)[jnp.arange(ROWS), token]


def total_and_gradients(read, model, x, token):
    """Of what is read, each number with a weight of its own, by the weights and the input."""
    graphdef, params = nnx.split(model)
    each = np.random.default_rng(2).normal(size=(ROWS, WIDTH)).astype("float32")

    def total(params, x):
        return (read(nnx.merge(graphdef, params), x, token) * each).sum()

    return jax.jit(jax.value_and_grad(total, (0, 1)))(params, x)


@pytest.mark.parametrize("token", [0, 4, TOKENS - 1, TOKEN_OF_EACH], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_one_token_is_what_it_is_among_all(token, causal):
    model, token = transformer(causal=causal), token if isinstance(token, int) else jnp.array(token)
    found = total_and_gradients(Transformer.at, model, inputs(), token)
    expected = total_and_gradients(at_of_all, model, inputs(), token)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )


@pytest.mark.parametrize("remat", ["dots", "dots_no_hidden", "full"])
def test_what_is_recomputed_changes_nothing(remat):
    token = jnp.array(TOKEN_OF_EACH)
    found = total_and_gradients(Transformer.at, transformer(remat=remat), inputs(), token)
    expected = total_and_gradients(Transformer.at, transformer(), inputs(), token)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )


def test_one_block_alone_and_a_list_of_blocks():
    token = jnp.array(TOKEN_OF_EACH)
    for layers in (1, 3):
        model = transformer(layers)
        expected = at_of_all(model, inputs(), token)
        np.testing.assert_allclose(model.at(inputs(), token), expected, rtol=1e-5, atol=1e-5)
        found = unstack(model).at(inputs(), token)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_causal_token_sees_none_after_it():
    model, x, token = transformer(causal=True), inputs(), jnp.array(TOKEN_OF_EACH)
    after = jnp.arange(TOKENS) > token[:, None]
    changed = model.at(jnp.where(after[:, :, None], 1e3, x), token)
    np.testing.assert_array_equal(changed, model.at(x, token))


@pytest.mark.parametrize("causal", [False, True])
def test_the_fused_kernel_is_given_an_even_number_of_tokens(causal, monkeypatch):
    def read(model, x, token):
        return model(x).mean(1)

    expected = total_and_gradients(read, transformer(causal=causal), inputs(), None)
    attend, numbers = jax.nn.dot_product_attention, []

    def fused_attend(q_BTKH, *args, implementation, **kwargs):
        assert implementation == "cudnn"
        numbers.append(q_BTKH.shape[1])
        return attend(q_BTKH, *args, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused_attend)
    for module in (attention_module, transformer_module):
        monkeypatch.setattr(module, "has_fused_kernel", lambda *_: True)
    found = total_and_gradients(read, transformer(causal=causal), inputs(), None)
    assert set(numbers) == {TOKENS + 1}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )


def test_on_a_gpu_what_is_read_at_one_token_lies_as_products_need_it():
    def lowered(platform):
        model = transformer()
        traced = jax.jit(lambda x: model.at(x, 0)).trace(inputs())
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "LayoutConstraint" in lowered("cuda")
    assert "LayoutConstraint" not in lowered("cpu") + lowered("tpu")
