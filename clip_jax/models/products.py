"""Products with weights and sums with them, whose gradients come in the dtype of the weights.

Each is computed as the backend at hand does it fastest.

Axis letters: B batch; H W pixels; I features or channels in, O out; k a kernel's side.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


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
# gradient by the kernel would otherwise be computed from transposed copies.
def _product(x: Array, matrix: Array) -> Array:
    return jax.lax.platform_dependent(x, matrix, tpu=jnp.matmul, default=_of_matrices)


def _product_over_rows(x: Array, y: Array, dtype: Any) -> Array:
    """[*rows, I] and [*rows, O] -> [I, O]."""

    def as_they_are(x: Array, y: Array) -> Array:
        rows = tuple(range(x.ndim - 1))
        return jnp.tensordot(x, y, (rows, rows), preferred_element_type=dtype)

    as_matrices = functools.partial(_of_matrices_over_rows, dtype=dtype)
    return jax.lax.platform_dependent(x, y, tpu=as_they_are, default=as_matrices)


def _of_matrices(x: Array, matrix: Array) -> Array:
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)


def _of_matrices_over_rows(x: Array, y: Array, dtype: Any) -> Array:
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return jnp.matmul(x.T, y, preferred_element_type=dtype)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(
    x: Float[Array, "B H W I"], kernel: Float[Array | np.ndarray, "k k I O"], stride: int
) -> Float[Array, "B H2 W2 O"]:
    """A convolution of odd size, padded to the same size, in the dtype of x.

    Its gradient by the kernel comes in the kernel's, as that of `matmul` does.
    """
    return _convolution(x, jnp.asarray(kernel, x.dtype), stride)


def _convolve_forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return convolve(x, kernel, stride), (x, kernel)


def _convolve_backward(
    stride: int, operands: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = operands
    by_x = jax.linear_transpose(lambda x: _convolution(x, kernel.astype(x.dtype), stride), x)
    return *by_x(gradient), _convolution_over_rows(x, gradient, kernel, stride)


convolve.defvjp(_convolve_forward, _convolve_backward)


# XLA's CPU convolutions by one pixel, and by a gradient, reach a tenth to a half of the rate of its
# products of matrices, which can be the same sums.
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


def _convolution_over_rows(x: Array, gradient: Array, kernel: Array, stride: int) -> Array:
    """[B, H, W, I] and [B, H2, W2, O] -> the gradient by the kernel [k, k, I, O]."""
    size, (height, width) = kernel.shape[0], gradient.shape[1:3]

    # The gradient slides over the padded image as a kernel does, and each place is one of its taps.
    def slide(x: Array, gradient: Array) -> Array:
        padding = [
            (size // 2, size - size // 2 - pixels + (pixels_out - 1) * stride)
            for pixels, pixels_out in zip(x.shape[1:3], (height, width), strict=True)
        ]
        return jax.lax.conv_general_dilated(
            x,
            gradient,
            (1, 1),
            padding,
            rhs_dilation=(stride, stride),
            dimension_numbers=("CHWN", "IHWO", "HWNC"),
            preferred_element_type=kernel.dtype,
        )

    # One after the other: the compiler would copy the image for all taps before it multiplied.
    def multiply_at_each_tap(x: Array, gradient: Array) -> Array:
        around = (size // 2, size // 2)
        padded = jnp.pad(x, [(0, 0), around, around, (0, 0)])
        reach = [(pixels - 1) * stride + 1 for pixels in (height, width)]

        def multiply(tap: Array) -> Array:
            corner = (0, tap // size, tap % size, 0)
            window = jax.lax.dynamic_slice(padded, corner, (x.shape[0], *reach, x.shape[3]))
            return _of_matrices_over_rows(window[:, ::stride, ::stride], gradient, kernel.dtype)

        return jax.lax.map(multiply, jnp.arange(size**2)).reshape(kernel.shape)

    return jax.lax.platform_dependent(x, gradient, cpu=multiply_at_each_tap, default=slide)
