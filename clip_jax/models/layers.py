"""The transformer both towers are made of.

Axis letters: B batch, T tokens, D width, K heads, H head width, F MLP width, L layers.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float

from clip_jax.errors import ConfigError

Remat = Literal["none", "dots", "full"]
Activation = Literal["quick_gelu", "gelu"]

LAYER_NORM_EPSILON = 1e-5


def quick_gelu(x: Array) -> Array:
    """The sigmoid approximation of GELU that the released CLIP models were trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def symmetric_uniform(bound: float) -> Initializer:
    """An initializer drawing from U(-bound, bound)."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class BlockInit(NamedTuple):
    """How the weights of one residual block start; the biases of attention start at zero."""

    attention_in: Initializer
    attention_out: Initializer
    mlp_up: Initializer
    mlp_up_bias: Initializer
    mlp_down: Initializer
    mlp_down_bias: Initializer

    @classmethod
    def torch_default(cls, width: int, mlp_width: int) -> "BlockInit":
        """What torch gives its layers, which the released code leaves in the image tower."""
        fan_width, fan_mlp = width**-0.5, mlp_width**-0.5
        return cls(
            attention_in=symmetric_uniform((6 / (4 * width)) ** 0.5),  # Xavier on [3D, D]
            attention_out=symmetric_uniform(fan_width),
            mlp_up=symmetric_uniform(fan_width),
            mlp_up_bias=symmetric_uniform(fan_width),
            mlp_down=symmetric_uniform(fan_mlp),
            mlp_down_bias=symmetric_uniform(fan_mlp),
        )

    @classmethod
    def scaled_normal(cls, width: int, mlp_width: int, layers: int) -> "BlockInit":
        """The text tower's: residual branches shrink with the depth (released code)."""
        normal = jax.nn.initializers.normal
        residual = width**-0.5 * (2 * layers) ** -0.5
        return cls(
            attention_in=normal(width**-0.5),
            attention_out=normal(residual),
            mlp_up=normal((2 * width) ** -0.5),
            mlp_up_bias=symmetric_uniform(width**-0.5),
            mlp_down=normal(residual),
            mlp_down_bias=symmetric_uniform(mlp_width**-0.5),
        )


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation computed in float32, returned in the input's dtype."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(
            width, epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
        )

    def __call__(self, x: Float[Array, "*batch D"], **kwargs: Any) -> Float[Array, "*batch D"]:
        return super().__call__(x, **kwargs).astype(x.dtype)


class Dense(nnx.Module):
    """A linear map from the trailing axes `in_shape` to the axes `out_shape`.

    It is computed as one product of two matrices, whatever the axes: XLA makes a fast GEMM of that
    on every backend, while on the CPU a product over [B, T, D] takes more than twice the time.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        *,
        kernel_init: Initializer,
        bias_init: Initializer | None = jax.nn.initializers.zeros,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.in_shape, self.out_shape, self.dtype = in_shape, out_shape, dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), in_shape + out_shape))
        if bias_init is not None:
            self.bias = nnx.Param(bias_init(rngs.params(), out_shape))

    def __call__(self, x: Float[Array, "*axes"]) -> Float[Array, "*other_axes"]:
        batch_shape = x.shape[: x.ndim - len(self.in_shape)]
        matrix = self.kernel.astype(self.dtype).reshape(math.prod(self.in_shape), -1)
        rows = x.astype(self.dtype).reshape(-1, matrix.shape[0])
        result = (rows @ matrix).reshape(batch_shape + self.out_shape)
        return result + self.bias.astype(self.dtype) if hasattr(self, "bias") else result


class Attention(nnx.Module):
    """Multi-head self-attention, the heads an axis of their own so that they can be sharded."""

    def __init__(
        self, width: int, heads: int, *, causal: bool, init: BlockInit, dtype, rngs: nnx.Rngs
    ):
        self.causal = causal
        split = (heads, width // heads)

        def project_in() -> Dense:
            return Dense((width,), split, kernel_init=init.attention_in, dtype=dtype, rngs=rngs)

        self.query, self.key, self.value = project_in(), project_in(), project_in()
        self.out = Dense(split, (width,), kernel_init=init.attention_out, dtype=dtype, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        q_BTKH, k_BTKH, v_BTKH = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        return self.out(jax.nn.dot_product_attention(q_BTKH, k_BTKH, v_BTKH, is_causal=self.causal))


class MLP(nnx.Module):
    """Width -> MLP width -> width."""

    def __init__(
        self,
        width: int,
        mlp_width: int,
        *,
        activation: Activation,
        init: BlockInit,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.up = Dense(
            (width,),
            (mlp_width,),
            kernel_init=init.mlp_up,
            bias_init=init.mlp_up_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.down = Dense(
            (mlp_width,),
            (width,),
            kernel_init=init.mlp_down,
            bias_init=init.mlp_down_bias,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Block(nnx.Module):
    """Pre-LN residual block: x + attention(ln_1 x), then x + mlp(ln_2 x)."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        activation: Activation,
        causal: bool,
        init: BlockInit,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.ln_1 = LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, causal=causal, init=init, dtype=dtype, rngs=rngs)
        self.ln_2 = LayerNorm(width, rngs=rngs)
        self.mlp = MLP(width, mlp_width, activation=activation, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nnx.Module):
    """L blocks in one stack: every parameter has a leading axis L, and a scan runs over it.

    Args:
        width: D; `heads` must divide it.
        layers: L.
        remat: what the backward pass recomputes: "none"; "dots" keeps the matmul outputs;
            "full" keeps only the blocks' inputs.
        unroll: layers in one turn of the loop. More compile longer; on the CPU they run faster
            (1.6 times for the quickstart's four layers), on accelerators it matters little.

    Raises:
        ConfigError: the heads do not divide the width, or an unknown `remat`.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_width: int,
        *,
        activation: Activation,
        causal: bool,
        init: BlockInit,
        dtype,
        remat: Remat,
        unroll: int,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ConfigError(f"{heads} heads do not divide the width {width}")
        if remat not in ("none", *REMAT_POLICIES):
            raise ConfigError(f"remat {remat!r}: choose one of none, {', '.join(REMAT_POLICIES)}")
        self.remat = remat
        self.unroll = min(unroll, layers)

        @nnx.split_rngs(splits=layers)
        @nnx.vmap
        def create_blocks(rngs: nnx.Rngs) -> Block:
            return Block(
                width,
                heads,
                mlp_width,
                activation=activation,
                causal=causal,
                init=init,
                dtype=dtype,
                rngs=rngs,
            )

        self.blocks = create_blocks(rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        def layer(x, block):
            return block(x), None

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return jax.lax.scan(layer, x, self.blocks, unroll=self.unroll)[0]
