"""Layers that the towers share.

Axis letters: B batch, T tokens, S queries, D width, K heads, H head width, F MLP width.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]

# The names under which remat policies find products: of attention, and of a bottleneck's inner
# channels; and the others.
NARROW, WIDE = "narrow product", "wide product"
STATISTICS = "statistics"


# Of attention's scores, float32, so many bytes are computed at once where a step is compiled for
# many rows: what fits into a TPU's vector memory is never written to its main memory.
SCORES_AT_ONCE = 2**24


class Rows(NamedTuple):
    """Where the rows of a batch lie; see `rows_lie`."""

    devices: int
    sharding: Callable[[int], Any] | None


_rows: contextvars.ContextVar[Rows | None] = contextvars.ContextVar("rows", default=None)


@contextlib.contextmanager
def rows_lie(devices: int = 1, sharding: Callable[[int], Any] | None = None) -> Iterator[None]:
    """While a model is traced: tells it where the rows of its activations are, and to keep them so.

    Knowing that, attention goes through them in groups. Without the sharding, a partitioner that
    places parameters that are split, too, might rather split the features, and gather the rows of
    the whole batch.

    Args:
        devices: that share out the rows of an array, as it is traced: 1 inside `jax.shard_map`.
        sharding: of an array of so many axes, the first of which are the rows; None: they are one
            device's own.
    """
    token = _rows.set(Rows(devices, sharding))
    try:
        yield
    finally:
        _rows.reset(token)


def keep_rows(x: Array) -> Array:
    """Marks activations, whose leading axis is the rows, with the sharding of `rows_lie`."""
    rows = _rows.get()
    if rows is None or rows.sharding is None:
        return x
    return jax.lax.with_sharding_constraint(x, rows.sharding(x.ndim))


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


class AttentionInit(NamedTuple):
    """How the weights of an attention start: query, key and value; out; and all four biases."""

    kernel_in: Initializer
    kernel_out: Initializer
    bias: Initializer = zeros


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


class Attention(nnx.Module):
    """Multi-head attention, the heads an axis of their own so that they can be sharded.

    Args:
        width: D, which `heads` divides.
        heads: K.
        out_width: E, of the result; None: D.
        causal: no token attends to a later one.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        init: AttentionInit,
        out_width: int | None = None,
        causal: bool = False,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.causal = causal
        split = (heads, width // heads)

        def dense(in_shape: tuple[int, ...], out_shape: tuple[int, ...], kernel_init) -> Dense:
            return Dense(
                in_shape,
                out_shape,
                kernel_init=kernel_init,
                bias_init=init.bias,
                kept=NARROW,
                dtype=dtype,
                rngs=rngs,
            )

        self.query, self.key, self.value = (
            dense((width,), split, init.kernel_in) for _ in range(3)
        )
        self.out = dense(split, (out_width or width,), init.kernel_out)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], queries_BSD: Float[Array, "B S D"] | None = None
    ) -> Float[Array, "B S E"]:
        """What the queries find among the tokens; without queries the tokens ask themselves."""
        q_BSKH = self.query(x_BTD if queries_BSD is None else queries_BSD)
        k_BTKH, v_BTKH = self.key(x_BTD), self.value(x_BTD)
        attend = functools.partial(
            jax.nn.dot_product_attention,
            is_causal=self.causal,
            implementation=(kernel := _fused_kernel(q_BSKH)),
        )
        group = len(q_BSKH) if kernel else _rows_at_once(q_BSKH, k_BTKH)
        if group < len(q_BSKH):
            attend = functools.partial(_attend_in_groups, attend, group)
        found_BSKH = attend(q_BSKH, k_BTKH, v_BTKH)
        heads_as_one = found_BSKH.reshape(*found_BSKH.shape[:2], -1)
        return self.out(checkpoint_name(heads_as_one, NARROW).reshape(found_BSKH.shape))


def _rows_at_once(q_BSKH: Array, k_BTKH: Array) -> int:
    """How many rows, of all devices together, have no more than `SCORES_AT_ONCE` on a device."""
    rows, (batch, queries, heads, _) = _rows.get(), q_BSKH.shape
    if rows is None or batch % rows.devices:
        return batch
    own, bytes_of_one = batch // rows.devices, 4 * heads * queries * k_BTKH.shape[1]
    fitting = (n for n in range(own, 1, -1) if own % n == 0 and n * bytes_of_one <= SCORES_AT_ONCE)
    return rows.devices * next(fitting, 1)


def _attend_in_groups(
    attend: Callable[..., Array], size: int, q_BSKH: Array, k_BTKH: Array, v_BTKH: Array
) -> Array:
    """`attend`, `size` rows after `size` rows; the backward pass computes their scores again.

    A group has every so many-th row, so that each device has its share of every group. Between
    products and groups the heads are one axis, see `Dense`.
    """
    heads = q_BSKH.shape[2]

    def in_groups(x_BTKH: Array) -> Array:
        x_BTD = x_BTKH.reshape(size, -1, x_BTKH.shape[1], heads * x_BTKH.shape[3])
        return jnp.moveaxis(keep_rows(x_BTD), 1, 0)

    def attend_group(qkv: tuple[Array, Array, Array]) -> Array:
        found = attend(*(keep_rows(x.reshape(*x.shape[:2], heads, -1)) for x in qkv))
        return keep_rows(found.reshape(*found.shape[:2], -1))

    attend_group = jax.checkpoint(attend_group, prevent_cse=False)  # the loop prevents it
    found = jax.lax.map(attend_group, tuple(in_groups(x) for x in (q_BSKH, k_BTKH, v_BTKH)))
    return jnp.moveaxis(found, 0, 1).reshape(q_BSKH.shape)


def _fused_kernel(q_BSKH: Array) -> Literal["cudnn"] | None:
    """cuDNN's on a GPU, for the dtypes and head widths that it takes; else what XLA makes of it."""
    if jax.default_backend() != "gpu" or q_BSKH.dtype not in (jnp.bfloat16, jnp.float16):
        return None
    return "cudnn" if q_BSKH.shape[-1] % 8 == 0 and q_BSKH.shape[-1] <= 128 else None


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
