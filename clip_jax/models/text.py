"""The text tower: a causal transformer read at the end-of-text token (paper, section 2.4)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from clip_jax.models.layers import Activation, BlockInit, LayerNorm, Remat, Transformer


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Architecture of the text tower."""

    width: int
    heads: int
    layers: int = 12
    context_length: int = 77
    vocab_size: int = 49408
    mlp_ratio: float = 4.0
    activation: Activation = "quick_gelu"


class TextTransformer(nnx.Module):
    """Token ids -> embeddings."""

    def __init__(
        self,
        config: TextConfig,
        embed_dim: int,
        *,
        dtype,
        remat: Remat,
        unroll: int,
        rngs: nnx.Rngs,
    ):
        width, mlp_width = config.width, int(config.width * config.mlp_ratio)
        normal = jax.nn.initializers.normal
        self.config = config
        self.dtype = dtype
        self.token_embedding = nnx.Param(normal(0.02)(rngs.params(), (config.vocab_size, width)))
        self.position_embedding = nnx.Param(
            normal(0.01)(rngs.params(), (config.context_length, width))
        )
        self.transformer = Transformer(
            width,
            config.layers,
            config.heads,
            mlp_width,
            activation=config.activation,
            causal=True,
            init=BlockInit.scaled_normal(width, mlp_width, config.layers),
            dtype=dtype,
            remat=remat,
            unroll=unroll,
            rngs=rngs,
        )
        self.ln_final = LayerNorm(width, rngs=rngs)
        self.projection = nnx.Param(normal(width**-0.5)(rngs.params(), (width, embed_dim)))

    def __call__(self, tokens_BT: Int[Array | np.ndarray, "B T"]) -> Float[Array, "B E"]:
        """Ids with zero padding -> embeddings in the compute dtype, not of unit length.

        The feature is read at the largest id, which is end-of-text; attention is causal, so the
        padding after it changes nothing. T may be shorter than the context, not longer.
        """
        length, context = tokens_BT.shape[1], self.config.context_length
        if length > context:
            raise ValueError(
                f"expected at most {context} tokens a text, got {length}; "
                f"tokenize with context_length={context}"
            )
        x_BTD = jnp.take(self.token_embedding.astype(self.dtype), tokens_BT, axis=0)
        x_BTD = x_BTD + self.position_embedding[:length].astype(self.dtype)
        x_BTD = self.transformer(x_BTD)
        end_B = jnp.argmax(tokens_BT, axis=1)
        x_BD = jnp.take_along_axis(x_BTD, end_B[:, None, None], axis=1)[:, 0]
        return self.ln_final(x_BD) @ self.projection.astype(self.dtype)
