"""The transformer that both towers are made of, and what its backward pass recomputes.

Axis letters: B batch, T tokens, D width, F MLP width, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from clip_jax.errors import ConfigError
from clip_jax.models.attention import Attention, AttentionInit, has_fused_kernel
from clip_jax.models.layers import (
    MLP,
    NARROW,
    STATISTICS,
    WIDE,
    Activation,
    LayerNorm,
    MLPInit,
    layer_of,
    normal,
    run_layers,
    symmetric_uniform,
)
from clip_jax.models.rows import features_minor, keep_rows

Remat = Literal["none", "dots", "dots_no_hidden", "full"]

_named = jax.checkpoint_policies.save_only_these_names
# BatchNorm's statistics are a few kilobytes, and come of a collective: always kept.
REMAT_POLICIES: dict[Remat, Any] = {
    "dots": _named(NARROW, WIDE, STATISTICS),
    "dots_no_hidden": _named(NARROW, STATISTICS),
    "full": _named(STATISTICS),
}
# What `train.remat = "auto"` tries, from the one that recomputes least. Not "none": it also keeps
# what lies between the products, which a TPU computes again faster than it fetches it.
AUTO_REMATS = tuple(REMAT_POLICIES)


def rematerialized(layer: Callable[..., Any], remat: Remat, *, in_loop: bool) -> Callable[..., Any]:
    """A layer of which the backward pass recomputes what `remat` says.

    Args:
        layer: a function of the features and the layer.
        remat: the policy.
        in_loop: it is the body of a loop of several turns. Elsewhere the compiler would find that
            what is recomputed has been computed before, and keep it: barriers hide that.

    Raises:
        ConfigError: an unknown `remat`.
    """
    if remat == "none":
        return layer
    if remat not in REMAT_POLICIES:
        raise ConfigError(f"remat {remat!r}: choose one of none, {', '.join(REMAT_POLICIES)}")
    return jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=not in_loop)


class BlockInit(NamedTuple):
    """How the weights of one residual block start."""

    attention: AttentionInit
    mlp: MLPInit

    @classmethod
    def torch_default(cls, width: int, mlp_width: int) -> "BlockInit":
        """What torch gives its layers, which the released code leaves in the image tower."""
        fan_width, fan_mlp = symmetric_uniform(width**-0.5), symmetric_uniform(mlp_width**-0.5)
        xavier = symmetric_uniform((6 / (4 * width)) ** 0.5)  # on [3D, D]
        return cls(
            AttentionInit(xavier, fan_width), MLPInit(fan_width, fan_width, fan_mlp, fan_mlp)
        )

    @classmethod
    def scaled_normal(cls, width: int, mlp_width: int, layers: int) -> "BlockInit":
        """The text tower's: residual branches shrink with the depth (released code)."""
        residual = normal(width**-0.5 * (2 * layers) ** -0.5)
        return cls(
            AttentionInit(normal(width**-0.5), residual),
            MLPInit(
                up=normal((2 * width) ** -0.5),
                up_bias=symmetric_uniform(width**-0.5),
                down=residual,
                down_bias=symmetric_uniform(mlp_width**-0.5),
            ),
        )

    @classmethod
    def xavier(cls, width: int, mlp_width: int) -> "BlockInit":
        """big_vision's, whose attention pooling this is."""
        square = symmetric_uniform((6 / (2 * width)) ** 0.5)
        mlp = symmetric_uniform((6 / (width + mlp_width)) ** 0.5)
        return cls(AttentionInit(square, square), MLPInit(mlp, normal(1e-6), mlp, normal(1e-6)))


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """What the blocks of one transformer have in common.

    Raises:
        ConfigError: the heads do not divide the width.
    """

    width: int
    heads: int
    mlp_width: int
    activation: Activation
    norm_epsilon: float
    init: BlockInit
    causal: bool = False

    def __post_init__(self):
        if self.width % self.heads:
            raise ConfigError(f"{self.heads} heads do not divide the width {self.width}")


class Block(nnx.Module):
    """Pre-LN residual block: x + attention(ln_1 x), then x + mlp(ln_2 x)."""

    def __init__(self, spec: BlockSpec, *, dtype, rngs: nnx.Rngs):
        self.ln_1 = LayerNorm(spec.width, spec.norm_epsilon, rngs=rngs)
        self.attention = Attention(
            spec.width,
            spec.heads,
            init=spec.init.attention,
            causal=spec.causal,
            dtype=dtype,
            rngs=rngs,
        )
        self.ln_2 = LayerNorm(spec.width, spec.norm_epsilon, rngs=rngs)
        self.mlp = MLP(
            spec.width,
            spec.mlp_width,
            activation=spec.activation,
            init=spec.init.mlp,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B T D"], seen_B: Int[Array, " B"] | None = None
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.ln_1(x), seen_B=seen_B)
        return x + self.mlp(self.ln_2(x))

    def at(
        self, x_BTD: Float[Array, "B T D"], token: int | Int[Array, " B"]
    ) -> Float[Array, "B 1 D"]:
        """`__call__` at one token of each row: of the others it takes their keys and values."""
        if isinstance(token, int):
            x_B1D = x_BTD[:, token : token + 1]
        else:
            x_B1D = jnp.take_along_axis(x_BTD, token[:, None, None], axis=1)
        seen_B = jnp.broadcast_to(token + 1, len(x_BTD)) if self.attention.causal else None
        x_B1D = x_B1D + self.attention(self.ln_1(x_BTD), self.ln_1(x_B1D), seen_B)
        return x_B1D + self.mlp(self.ln_2(x_B1D))


class Transformer(nnx.Module):
    """L blocks in one stack: every parameter has a leading axis L, and a scan runs over it.

    `stacks.unstack` makes a list of blocks of it.

    Args:
        spec: of its blocks.
        layers: L.
        remat: what the backward pass recomputes: "none"; "dots" keeps the outputs of the products
            with weights; "dots_no_hidden" of these not the MLP's hidden layer, half of the memory
            for a ninth more operations; "full" keeps only the blocks' inputs. A ResNet's products
            are its convolutions, and "dots_no_hidden" leaves out the wide ones.
        unroll: layers in one turn of the loop. More compile longer; on the CPU and on GPUs they run
            faster (1.6 times for the quickstart's four layers), on TPUs it matters little.

    Raises:
        ConfigError: an unknown `remat`.
    """

    def __init__(
        self,
        spec: BlockSpec,
        layers: int,
        *,
        dtype,
        remat: Remat,
        unroll: int,
        rngs: nnx.Rngs,
    ):
        rematerialized(lambda x: x, remat, in_loop=True)  # refuses a remat that does not exist
        self.layers, self.remat, self.unroll, self.causal = layers, remat, unroll, spec.causal
        self.head_width = spec.width // spec.heads

        @nnx.split_rngs(splits=layers)
        @nnx.vmap
        def create_blocks(rngs: nnx.Rngs) -> Block:
            return Block(spec, dtype=dtype, rngs=rngs)

        self.blocks: nnx.Module = create_blocks(rngs)

    def __call__(self, x: Float[Array, "B T D"], layer: int = -1) -> Float[Array, "B T D"]:
        """The state after the first `layer` blocks; -1 stands for all, -2 for all but the last.

        Raises:
            ValueError: there is no such layer.
        """
        count, tokens = resolve_layer(layer, self.layers), x.shape[1]
        # The fused kernel wants an even number. Nothing sees the token that is added: it is the
        # last, which causal attention hides, and `seen_B` elsewhere.
        added = tokens % 2 if has_fused_kernel(x.dtype, self.head_width) else 0
        seen_B = jnp.full(len(x), tokens) if added and not self.causal else None

        def run(x, block):
            return keep_rows(block(x, seen_B)), None

        run = rematerialized(run, self.remat, in_loop=self.unroll < count)
        x = jnp.pad(x, [(0, 0), (0, added), (0, 0)])
        return run_layers(run, x, self.blocks, count, self.unroll)[0][:, :tokens]

    def at(
        self, x_BTD: Float[Array, "B T D"], token: int | Int[Array, " B"]
    ) -> Float[Array, "B D"]:
        """The last state of one token of each row, without that of the others.

        A tower that is read at one token needs nothing else, which saves five sixths of a block.

        Args:
            x_BTD: what goes into the first block.
            token: its number, from 0; one for all rows or one for each.
        """
        x_BTD = features_minor(self(x_BTD, layer=-2))

        def run(x_BTD, block):
            return keep_rows(block.at(x_BTD, token))

        run = rematerialized(run, self.remat, in_loop=False)
        return run(x_BTD, layer_of(self.blocks, self.layers - 1))[:, 0]


def resolve_layer(layer: int, layers: int) -> int:
    """How many of `layers` layers to run for the state called `layer`.

    Counted as Hugging Face counts `hidden_states`: 0 is what goes into the first layer, `layers` or
    -1 what comes out of the last, -2 what comes out of the one before.

    Raises:
        ValueError: there is no such layer.
    """
    count = layer if layer >= 0 else layers + 1 + layer
    if not 0 <= count <= layers:
        raise ValueError(f"layer {layer}: expected {-layers - 1} to {layers} for {layers} layers")
    return count
