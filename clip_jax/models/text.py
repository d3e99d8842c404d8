"""The text tower: a transformer read at the end of the text (paper, section 2.4)."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from clip_jax.errors import ConfigError
from clip_jax.models.layers import Activation, LayerNorm, normal, symmetric_uniform
from clip_jax.models.products import add, matmul
from clip_jax.models.transformer import BlockInit, BlockSpec, Remat, Transformer


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Architecture of the text tower.

    Attributes:
        pool: the token that stands for the text: "eot", the one with the largest id, which is the
            end of text in CLIP's vocabulary, or "last", the last of the context (SigLIP).
        causal: no token attends to a later one.
        projection: a matrix leads from the width to the embedding; without it they are equal.
        projection_bias: with a bias.
    """

    width: int
    heads: int
    layers: int = 12
    context_length: int = 77
    vocab_size: int = 49408
    mlp_ratio: float = 4.0
    activation: Activation = "quick_gelu"
    pool: Literal["eot", "last"] = "eot"
    causal: bool = True
    projection: bool = True
    projection_bias: bool = False
    norm_epsilon: float = 1e-5


class TextTransformer(nnx.Module):
    """Token ids -> embeddings.

    Raises:
        ConfigError: the parts do not fit.
    """

    def __init__(
        self,
        config: TextConfig,
        embed_dim: int,
        *,
        dtype: Any,
        remat: Remat,
        unroll: int,
        rngs: nnx.Rngs,
    ):
        _check(config, embed_dim)
        width, mlp_width = config.width, int(config.width * config.mlp_ratio)
        self.config = config
        self.dtype = dtype
        self.token_embedding = nnx.Param(normal(0.02)(rngs.params(), (config.vocab_size, width)))
        self.position_embedding = nnx.Param(
            normal(0.01)(rngs.params(), (config.context_length, width))
        )
        spec = BlockSpec(
            width,
            config.heads,
            mlp_width,
            activation=config.activation,
            norm_epsilon=config.norm_epsilon,
            init=BlockInit.scaled_normal(width, mlp_width, config.layers),
            causal=config.causal,
        )
        self.transformer = Transformer(
            spec, config.layers, dtype=dtype, remat=remat, unroll=unroll, rngs=rngs
        )
        self.ln_final = LayerNorm(width, config.norm_epsilon, rngs=rngs)
        if config.projection:
            self.projection = nnx.Param(normal(width**-0.5)(rngs.params(), (width, embed_dim)))
        if config.projection_bias:
            bias = symmetric_uniform(width**-0.5)
            self.projection_bias = nnx.Param(bias(rngs.params(), (embed_dim,)))

    def __call__(self, tokens_BT: Int[Array | np.ndarray, "B T"]) -> Float[Array, "B E"]:
        """Ids with zero padding -> embeddings in the compute dtype, not of unit length.

        The feature is read at the largest id, which is end-of-text; attention is causal, so the
        padding after it changes nothing. T may be shorter than the context, not longer; read at the
        last token, it must be the context.
        """
        x_BE = self.pooled(tokens_BT)
        if self.config.projection:
            x_BE = matmul(x_BE, self.projection[...])
        if self.config.projection_bias:
            x_BE = add(x_BE, self.projection_bias[...])
        return x_BE

    def pooled(self, tokens_BT: Int[Array | np.ndarray, "B T"]) -> Float[Array, "B D"]:
        """The feature of each text before the projection."""
        x_BTD, length = self._embed(tokens_BT), tokens_BT.shape[1]
        if self.config.pool == "eot":
            x_BD = self.transformer.at(x_BTD, jnp.argmax(tokens_BT, axis=1))
        elif length == self.config.context_length:
            x_BD = self.transformer.at(x_BTD, length - 1)
        else:
            raise ValueError(
                f"this model reads a text at its last token: expected texts padded to "
                f"{self.config.context_length} tokens, got {length}"
            )
        return self.ln_final(x_BD)

    def features(
        self,
        tokens_BT: Int[Array | np.ndarray, "B T"],
        layer: int = -1,
        final_norm: bool = False,
    ) -> Float[Array, "B T D"]:
        """Every token after `layer` blocks; see `CLIP.encode_text`."""
        x_BTD = self.transformer(self._embed(tokens_BT), layer)
        return self.ln_final(x_BTD) if final_norm else x_BTD

    def _embed(self, tokens_BT: Int[Array | np.ndarray, "B T"]) -> Float[Array, "B T D"]:
        """What goes into the first block: tokens, positions added."""
        length, context = tokens_BT.shape[1], self.config.context_length
        if length > context:
            raise ValueError(
                f"expected at most {context} tokens a text, got {length}; "
                f"tokenize with context_length={context}"
            )
        x_BTD = jnp.take(self.token_embedding[...], tokens_BT, axis=0).astype(self.dtype)
        return add(x_BTD, self.position_embedding[:length])


def _check(config: TextConfig, embed_dim: int) -> None:
    if not config.projection and config.width != embed_dim:
        raise ConfigError(
            f"text.projection=False makes the width the embedding: expected embed_dim "
            f"{config.width}, got {embed_dim}"
        )
