"""Layers that the towers share.

Axis letters: B batch, T tokens, D width, F MLP width.
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

from clip_jax.models.products import add, matmul
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


zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
normal = jax.nn.initializers.normal


class MLPInit(NamedTuple):
    """How the weights of an MLP start."""

    up: Initializer
    up_bias: Initializer
    down: Initializer
    down_bias: Initializer


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*rows D"],
    scale: Float[Array | np.ndarray, " D"],
    bias: Float[Array | np.ndarray, " D"],
    epsilon: float,
) -> Float[Array, "*rows D"]:
    """Layer normalisation computed in float32, returned in the dtype of x.

    For the backward pass it keeps x and two numbers a row. JAX would keep float32 features; and
    without the barrier the compiler would keep no numbers, and go through x for them once more.
    """
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(
    x: Array, scale: Array | np.ndarray, bias: Array | np.ndarray, epsilon: float
) -> tuple[Array, Any]:
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
    mean, inverse_std = jax.lax.optimization_barrier((mean, jax.lax.rsqrt(variance + epsilon)))
    normalized = (x32 - mean) * inverse_std
    return (normalized * scale + bias).astype(x.dtype), (x, scale, mean, inverse_std)


def _layer_norm_backward(epsilon: float, kept: Any, gradient: Array) -> tuple[Array, Array, Array]:
    x, scale, mean, inverse_std = kept
    normalized = (x.astype(jnp.float32) - mean) * inverse_std
    gradient = gradient.astype(jnp.float32)
    rows = tuple(range(x.ndim - 1))
    by_normalized = gradient * scale
    along_x = jnp.mean(by_normalized * normalized, axis=-1, keepdims=True)
    along_mean = jnp.mean(by_normalized, axis=-1, keepdims=True)
    by_x = (by_normalized - along_mean - normalized * along_x) * inverse_std
    by_scale, by_bias = jnp.sum(gradient * normalized, rows), jnp.sum(gradient, rows)
    return by_x.astype(x.dtype), by_scale.astype(scale.dtype), by_bias.astype(scale.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nnx.Module):
    """`layer_norm`, with its weights."""

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = nnx.Param(ones(rngs.params(), (width,)))
        self.bias = nnx.Param(zeros(rngs.params(), (width,)))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


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
