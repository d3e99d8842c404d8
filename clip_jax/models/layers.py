"""Layers that the towers share.

Axis letters: B batch, T tokens, D width, F MLP width; H W pixels, I channels in, O channels out.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float

from clip_jax.models.rows import keep_rows

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]

# The names under which remat policies find products: of attention, and of a bottleneck's inner
# channels; and the others.
NARROW, WIDE = "narrow product", "wide product"
STATISTICS = "statistics"


class Training(NamedTuple):
    """Marks a forward pass of training, and carries what it needs beside its input.

    In such a pass BatchNorm normalises by the batch and moves its running statistics (in place, as
    `nnx.BatchStat`), and patch dropout drops; without it nothing is random and nothing changes.

    Attributes:
        image_keys: [B], a random key for each image, so that what is dropped depends neither on how
            the batch is split nor on its order. Only patch dropout reads them.
        axis_names: inside `jax.shard_map`, the mesh axes that split the batch: statistics are then
            those of the whole batch. Under a plain `jax.jit` a mean over the batch is global
            already, and there are none to name.
    """

    image_keys: Array | None = None
    axis_names: tuple[str, ...] = ()


def quick_gelu(x: Array) -> Array:
    """The sigmoid approximation of GELU that the released CLIP models were trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def check_images(images_BHWC: Array | np.ndarray, size: int) -> Array:
    """The images as a JAX array.

    Raises:
        ValueError: they are not [B, size, size, 3].
    """
    if images_BHWC.shape[1:] != (size, size, 3):
        raise ValueError(
            f"expected images of shape [B, {size}, {size}, 3], got {images_BHWC.shape}; "
            "resize them with the model's preprocess"
        )
    return jnp.asarray(images_BHWC)


def symmetric_uniform(bound: float) -> Initializer:
    """An initializer drawing from U(-bound, bound)."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


zeros, normal = jax.nn.initializers.zeros, jax.nn.initializers.normal


class MLPInit(NamedTuple):
    """How the weights of an MLP start."""

    up: Initializer
    up_bias: Initializer
    down: Initializer
    down_bias: Initializer


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation computed in float32, returned in the input's dtype."""

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        super().__init__(
            width, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
        )

    def __call__(self, x: Float[Array, "*batch D"], **kwargs: Any) -> Float[Array, "*batch D"]:
        return super().__call__(x, **kwargs).astype(x.dtype)


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


# On a TPU, [B, T, D] is laid out in tiles of its own wherever T is no multiple of 8, and a reshape
# to a matrix is a copy. On the CPU, that matrix makes a training step a tenth faster.
def _product(x: Array, matrix: Array) -> Array:
    def as_matrix(x: Array, matrix: Array) -> Array:
        return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, matrix, cpu=as_matrix, default=jnp.matmul)


def _product_over_rows(x: Array, y: Array, dtype: Any) -> Array:
    """[*rows, I] and [*rows, O] -> [I, O]."""

    def as_matrices(x: Array, y: Array) -> Array:
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        return jnp.matmul(x.T, y, preferred_element_type=dtype)

    def as_they_are(x: Array, y: Array) -> Array:
        rows = tuple(range(x.ndim - 1))
        return jnp.tensordot(x, y, (rows, rows), preferred_element_type=dtype)

    return jax.lax.platform_dependent(x, y, cpu=as_matrices, default=as_they_are)


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def add(
    x: Float[Array, "*rows_and_axes"], weights: Float[Array | np.ndarray, "*axes"]
) -> Float[Array, "..."]:
    """Adds a bias, or positions, in the dtype of x; as in `matmul`, their gradient is in theirs."""
    return x + weights.astype(x.dtype)


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
    return _convolve(x, jnp.asarray(kernel, x.dtype), stride)


def _convolve(x: Array, kernel: Array, stride: int) -> Array:
    padding = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _convolve_forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return convolve(x, kernel, stride), (x, kernel)


def _convolve_backward(
    stride: int, operands: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = operands
    by_x = jax.linear_transpose(lambda x: _convolve(x, kernel.astype(x.dtype), stride), x)
    size = kernel.shape[0]
    padding = [
        (size // 2, size - size // 2 - pixels + (pixels_out - 1) * stride)
        for pixels, pixels_out in zip(x.shape[1:3], gradient.shape[1:3], strict=True)
    ]
    # The gradient slides over the padded image as a kernel does, and each place is one of its taps.
    by_kernel = jax.lax.conv_general_dilated(
        x,
        gradient,
        (1, 1),
        padding,
        rhs_dilation=(stride, stride),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=kernel.dtype,
    )
    return *by_x(gradient), by_kernel


convolve.defvjp(_convolve_forward, _convolve_backward)


class Dense(nnx.Module):
    """A linear map from the trailing axes `in_shape` to the axes `out_shape`.

    A remat policy finds the product under the name `kept`, its `out_shape` still one axis: as heads
    it would be padded on a TPU, whose tiles are 128 wide, to twice its size.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        *,
        kernel_init: Initializer,
        bias_init: Initializer | None = zeros,
        kept: str = WIDE,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.in_shape, self.out_shape, self.kept, self.dtype = in_shape, out_shape, kept, dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), in_shape + out_shape))
        if bias_init is not None:
            self.bias = nnx.Param(bias_init(rngs.params(), out_shape))

    def __call__(self, x: Float[Array, "*axes"]) -> Float[Array, "*other_axes"]:
        batch_shape = x.shape[: x.ndim - len(self.in_shape)]
        matrix = self.kernel.reshape(math.prod(self.in_shape), -1)
        rows = keep_rows(x.astype(self.dtype).reshape(*batch_shape, matrix.shape[0]))
        product = checkpoint_name(keep_rows(matmul(rows, matrix)), self.kept)
        result = product.reshape(batch_shape + self.out_shape)
        return add(result, self.bias[...]) if hasattr(self, "bias") else result


class MLP(nnx.Module):
    """Width -> MLP width -> width."""

    def __init__(
        self,
        width: int,
        mlp_width: int,
        *,
        activation: Activation,
        init: MLPInit,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.up = Dense(
            (width,),
            (mlp_width,),
            kernel_init=init.up,
            bias_init=init.up_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.down = Dense(
            (mlp_width,),
            (width,),
            kernel_init=init.down,
            bias_init=init.down_bias,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


def layer_of(layers: Any, number: int) -> Any:
    """One layer of a stack or of a list of them."""
    if isinstance(layers, nnx.List):
        return layers[number]
    return jax.tree.map(lambda stacked: stacked[number], layers)


def run_layers(
    run: Callable[[Array, Any], tuple[Array, Any]], x: Array, layers: Any, count: int, unroll: int
) -> tuple[Array, Any]:
    """`x, out = run(x, layer)` through the first `count` layers; x, and the outs of the layers.

    Args:
        run: of one layer.
        x: goes through.
        layers: in one stack, over which a scan runs; or a list of them (`stacks.unstack`), whose
            outs are by number.
        count: the first ones that are run.
        unroll: layers in one turn of the scan.
    """
    if isinstance(layers, nnx.List):
        outs = {}
        for number in range(count):
            x, outs[number] = run(x, layers[number])
        return x, outs
    if count < jax.tree.leaves(layers)[0].shape[0]:
        layers = jax.tree.map(lambda stacked: stacked[:count], layers)
    return jax.lax.scan(run, x, layers, unroll=max(1, min(unroll, count)))
