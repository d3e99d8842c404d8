"""Products with weights and sums with them, whose gradients come in the dtype of the weights.

Each is computed as the backend at hand does it fastest.

Axis letters: B batch; H W pixels; I features or channels in, O out; k a kernel's side.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jaxtyping import Array, Float

from clip_jax.models.rows import rows_at_once

# A CPU sums a gradient by a convolution's kernel over so many pixels at once, by measurement.
PIXELS_AT_ONCE = 4096


@jax.custom_vjp
def matmul(
    x: Float[Array, "*rows I"], kernel: Float[Array | np.ndarray, "I O"]
) -> Float[Array, "*rows O"]:
    """The product in the dtype of x; its gradient by the kernel comes in the kernel's.

    That gradient is a sum over all rows, on a mesh that splits parameters also over devices: in
    bfloat16 each addition between them would round it.
    """
    return _product(x, jnp.asarray(kernel, x.dtype))


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    by_x = _product(gradient, kernel.astype(x.dtype).T)
    return by_x, _product_over_rows(x, gradient, kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


# On a TPU, [B, T, D] is laid out in tiles of its own wherever T is no multiple of 8, and a reshape
# to a matrix is a copy. On the CPU, that matrix makes a training step a tenth faster; on a GPU the
# gradient by the kernel would otherwise be computed from transposed copies. On the CPU it is, for
# its fastest product takes matrices as they lie.
def _product(x: Array, matrix: Array) -> Array:
    return jax.lax.platform_dependent(x, matrix, tpu=jnp.matmul, default=_of_matrices)


def _product_over_rows(x: Array, y: Array, dtype: Any) -> Array:
    """[*rows, I] and [*rows, O] -> [I, O]."""

    def as_they_are(x: Array, y: Array) -> Array:
        rows = tuple(range(x.ndim - 1))
        return jnp.tensordot(x, y, (rows, rows), preferred_element_type=dtype)

    def as_matrices(x: Array, y: Array) -> Array:
        x, y = _as_matrix(x), _as_matrix(y)
        return jnp.matmul(x.T, y, preferred_element_type=dtype)

    def transposed_first(x: Array, y: Array) -> Array:
        x, y = _as_matrix(x), _as_matrix(y)
        if x.shape[1] > y.shape[1]:
            return jax.lax.optimization_barrier(transposed_first(y, x)).T
        return jnp.matmul(jax.lax.optimization_barrier(x.T), y, preferred_element_type=dtype)

    return jax.lax.platform_dependent(
        x, y, tpu=as_they_are, cpu=transposed_first, default=as_matrices
    )


def _as_matrix(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _of_matrices(x: Array, matrix: Array) -> Array:
    return (_as_matrix(x) @ matrix).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def add(
    x: Float[Array, "*rows_and_axes"], weights: Float[Array | np.ndarray, "*axes"]
) -> Float[Array, "..."]:
    """Adds a bias, or positions, in the dtype of x; as in `matmul`, their gradient is in theirs."""
    return jax.lax.platform_dependent(x, weights.astype(x.dtype), cuda=_add_vector, default=jnp.add)


# With a product of matrices cuBLAS adds a vector, but not one that is split into heads.
def _add_vector(x: Array, weights: Array) -> Array:
    rows = x.shape[: x.ndim - weights.ndim]
    return (x.reshape(*rows, -1) + weights.reshape(-1)).reshape(x.shape)


def _add_forward(x: Array, weights: Array) -> tuple[Array, Array]:
    return add(x, weights), weights


def _add_backward(weights: Array, gradient: Array) -> tuple[Array, Array]:
    rows = tuple(range(gradient.ndim - weights.ndim))
    return gradient, jnp.sum(gradient, rows, dtype=weights.dtype)


add.defvjp(_add_forward, _add_backward)


def convolve(
    x: Float[Array, "B H W I"], kernel: Float[Array | np.ndarray, "k k I O"], stride: int
) -> Float[Array, "B H2 W2 O"]:
    """A convolution of odd size, padded to the same size, in the dtype of x.

    Its gradient by the kernel comes in the kernel's, as that of `matmul` does.
    """
    images = PIXELS_AT_ONCE * stride**2 // math.prod(x.shape[1:3])
    return _convolve(x, kernel, stride, rows_at_once(len(x), max(2, images)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: Array, kernel: Array | np.ndarray, stride: int, group: int) -> Array:
    del group  # of images, for the backward pass
    return _convolution(x, jnp.asarray(kernel, x.dtype), stride)


def _convolve_forward(
    x: Array, kernel: Array, stride: int, group: int
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel, stride, group), (x, kernel)


def _convolve_backward(
    stride: int, group: int, operands: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = operands
    by_x = jax.linear_transpose(lambda x: _convolution(x, kernel.astype(x.dtype), stride), x)
    return *by_x(gradient), _convolution_over_rows(x, gradient, kernel, stride, group)


_convolve.defvjp(_convolve_forward, _convolve_backward)


# On the CPU, XLA's convolutions by one pixel and by a gradient as it lies are not its fast ones.
def _convolution(x: Array, kernel: Array, stride: int) -> Array:
    padding = kernel.shape[0] // 2

    def slide(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def multiply(x: Array, kernel: Array) -> Array:
        return _of_matrices(x, kernel[0, 0])

    if kernel.shape[0] == stride == 1:
        return jax.lax.platform_dependent(x, kernel, cpu=multiply, default=slide)
    return slide(x, kernel)


def _convolution_over_rows(
    x: Array, gradient: Array, kernel: Array, stride: int, group: int
) -> Array:
    """[B, H, W, I] and [B, H2, W2, O] -> the gradient by the kernel [k, k, I, O]."""
    size = kernel.shape[0]
    padding = [
        (size // 2, size - size // 2 - pixels + (pixels_out - 1) * stride)
        for pixels, pixels_out in zip(x.shape[1:3], gradient.shape[1:3], strict=True)
    ]

    # The gradient slides over the padded image as a kernel does; the channels take the batch's
    # place, and the images the channels'.
    def slide(x: Array, gradient: Array, axes: tuple[str, str, str]) -> Array:
        return jax.lax.conv_general_dilated(
            x,
            gradient,
            (1, 1),
            padding,
            rhs_dilation=(stride, stride),
            dimension_numbers=axes,
            preferred_element_type=kernel.dtype,
        )

    def as_they_lie(x: Array, gradient: Array) -> Array:
        return slide(x, gradient, ("CHWN", "IHWO", "HWNC"))

    # Transposed, a few images fit a cache, and are multiplied as fast as they can be.
    def transposed_in_groups(x: Array, gradient: Array) -> Array:
        x, gradient = (y.reshape(group, -1, *y.shape[1:]) for y in (x, gradient))

        def of_group(number: Array) -> Array:
            x_BHWI, gradient_BHWO = (
                jax.lax.dynamic_index_in_dim(y, number, axis=1, keepdims=False)
                for y in (x, gradient)
            )
            x_IHWB = rearrange(x_BHWI, "b h w i -> i h w b")
            gradient_HWBO = rearrange(gradient_BHWO, "b h w o -> h w b o")
            x_IHWB, gradient_HWBO = jax.lax.optimization_barrier((x_IHWB, gradient_HWBO))
            return slide(x_IHWB, gradient_HWBO, ("NHWC", "HWIO", "NHWC"))

        of_groups = jax.lax.map(of_group, jnp.arange(x.shape[1]))
        return reduce(of_groups, "g i h w o -> h w i o", "sum")

    def multiply(x: Array, gradient: Array) -> Array:
        return _product_over_rows(x, gradient, kernel.dtype)[None, None]

    on_cpu = multiply if size == stride == 1 else transposed_in_groups
    return jax.lax.platform_dependent(x, gradient, cpu=on_cpu, default=as_they_lie)
