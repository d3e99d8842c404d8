"""Multi-head attention.

Axis letters: B batch, T tokens, S queries, D width, K heads, H head width, E width of the result.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Int

from clip_jax.models.layers import NARROW, Dense, zeros
from clip_jax.models.rows import keep_rows, rows_at_once, where_rows_lie

# Of attention's scores, float32, so many bytes are computed at once where a step is compiled for
# many rows: what fits into a TPU's vector memory is never written to its main memory.
SCORES_AT_ONCE = 2**24


class AttentionInit(NamedTuple):
    """How the weights of an attention start: query, key and value; out; and all four biases."""

    kernel_in: Initializer
    kernel_out: Initializer
    bias: Initializer = zeros


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
        self,
        x_BTD: Float[Array, "B T D"],
        queries_BSD: Float[Array, "B S D"] | None = None,
        seen_B: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B S E"]:
        """What the queries find among the tokens; without queries the tokens ask themselves.

        Args:
            x_BTD: the tokens.
            queries_BSD: few, whose scores are small whatever the number of rows.
            seen_B: how many tokens the queries of a row see, from the first on; None: all.
        """
        q_BSKH = self.query(x_BTD if queries_BSD is None else queries_BSD)
        k_BTKH, v_BTKH = self.key(x_BTD), self.value(x_BTD)
        all_ask = queries_BSD is None
        fused = all_ask and has_fused_kernel(q_BSKH.dtype, q_BSKH.shape[-1])
        attend = functools.partial(
            jax.nn.dot_product_attention,
            is_causal=self.causal and all_ask,
            key_value_seq_lengths=seen_B,
            implementation="cudnn" if fused else None,
        )
        if all_ask and seen_B is None and not fused and where_rows_lie():
            rows, tokens, heads, _ = q_BSKH.shape
            group = rows_at_once(rows, SCORES_AT_ONCE // (4 * heads * tokens**2))
            if group < rows:
                attend = functools.partial(_attend_in_groups, attend, group)
        found_BSKH = attend(q_BSKH, k_BTKH, v_BTKH)
        heads_as_one = found_BSKH.reshape(*found_BSKH.shape[:2], -1)
        return self.out(checkpoint_name(heads_as_one, NARROW).reshape(found_BSKH.shape))


def has_fused_kernel(dtype: Any, head_width: int) -> bool:
    """Whether attention of all tokens to all is one kernel of cuDNN: on a GPU, in 16 bits.

    JAX refuses to differentiate it by an odd number of tokens.
    """
    if jax.default_backend() != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    return head_width % 8 == 0 and head_width <= 128


def _attend_in_groups(
    attend: Callable[..., Array], size: int, q_BTKH: Array, k_BTKH: Array, v_BTKH: Array
) -> Array:
    """`attend`, `size` rows after `size` rows; the backward pass computes their scores again.

    The groups are those of `rows.rows_at_once`. Between products and groups the heads are one axis,
    see `Dense`.
    """
    heads = q_BTKH.shape[2]

    def in_groups(x_BTKH: Array) -> Array:
        x_BTD = x_BTKH.reshape(size, -1, x_BTKH.shape[1], heads * x_BTKH.shape[3])
        return jnp.moveaxis(keep_rows(x_BTD), 1, 0)

    def attend_group(qkv: tuple[Array, Array, Array]) -> Array:
        found = attend(*(keep_rows(x.reshape(*x.shape[:2], heads, -1)) for x in qkv))
        return keep_rows(found.reshape(*found.shape[:2], -1))

    attend_group = jax.checkpoint(attend_group, prevent_cse=False)  # the loop prevents it
    found = jax.lax.map(attend_group, tuple(in_groups(x) for x in (q_BTKH, k_BTKH, v_BTKH)))
    return jnp.moveaxis(found, 0, 1).reshape(q_BTKH.shape)
