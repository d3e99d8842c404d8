"""Gradients of weights: float32, whatever the towers compute in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.models.products import add, convolve, matmul
from clip_jax.models.rows import rows_lie
from clip_jax.models.text import TextConfig, TextTransformer

DRAWN = np.random.default_rng(0)


def drawn(*shape, dtype=jnp.float32):
    return jnp.asarray(DRAWN.normal(size=shape), dtype)


@pytest.fixture(params=["cpu", "cuda", "tpu"])
def each_way(request, monkeypatch):
    """The same test of what each backend would compute."""

    def chosen(*operands, default=None, **by_platform):
        return by_platform.get(request.param, default)(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)


@pytest.mark.usefixtures("each_way")
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


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("axes", [(8,), (2, 4), (5, 2, 4)], ids=str)
def test_a_bias_is_added_along_its_axes(axes):
    x, bias = drawn(3, *axes), drawn(*axes)
    cotangent = drawn(*x.shape)
    found, backward = jax.vjp(add, x, bias)
    np.testing.assert_array_equal(found, np.asarray(x) + np.asarray(bias))
    by_x, by_bias = backward(cotangent)
    np.testing.assert_array_equal(by_x, cotangent)
    np.testing.assert_allclose(by_bias, np.asarray(cotangent).sum(0), rtol=1e-5, atol=1e-5)


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


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (3, 2), (5, 2)])
def test_so_it_is_by_the_kernel_of_a_convolution(size, stride):
    draw = np.random.default_rng(size).normal
    x = jnp.asarray(draw(size=(16, 9, 12, 3)), jnp.bfloat16)
    kernel = jnp.asarray(draw(size=(size, size, 3, 5)), jnp.float32)
    product, backward = jax.vjp(lambda x, kernel: convolve(x, kernel, stride), x, kernel)
    cotangent = jnp.asarray(draw(size=product.shape), jnp.bfloat16)
    by_x, by_kernel = backward(cotangent)
    assert (product.dtype, by_x.dtype, by_kernel.dtype) == ("bfloat16", "bfloat16", "float32")

    def in_float32(x, kernel):
        padding, axes = [(size // 2, size // 2)] * 2, ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=axes
        )

    rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    expected, exact_backward = jax.vjp(in_float32, x.astype(jnp.float32), rounded)
    exact_by_x, exact_by_kernel = exact_backward(cotangent.astype(jnp.float32))
    np.testing.assert_allclose(by_kernel, exact_by_kernel, rtol=1e-4, atol=1e-4)
    for found, exact in ((product, expected), (by_x, exact_by_x)):
        np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=1e-2, atol=0.1)


def by_kernel(image, gradient):
    kernel = jnp.zeros((3, 3, image.shape[3], gradient.shape[3]))
    return jax.vjp(lambda kernel: convolve(image, kernel, 1), kernel)[1](gradient)[0]


def test_on_a_cpu_the_gradient_by_a_kernel_transposes_some_images_at_a_time():
    image = drawn(32, 32, 32, 32)
    compiled = jax.jit(by_kernel).lower(image, image).compile()
    # Four of the 32, twice; and what the eight groups add up to.
    assert compiled.memory_analysis().temp_size_in_bytes < image.nbytes / 2


def test_and_each_device_its_own(mesh):
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    image = drawn(6 * devices, 32, 32, 4)
    expected = by_kernel(image, image)
    with rows_lie(devices):
        compiled = jax.jit(by_kernel).lower(*[jax.device_put(image, rows)] * 2).compile()
    assert "all-gather" not in compiled.as_text()
    found = compiled(*[jax.device_put(image, rows)] * 2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-2)
