"""The image tower: a Vision Transformer as in the paper (section 2.4 and the released code)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from clip_jax.errors import ConfigError
from clip_jax.models.layers import (
    Activation,
    BlockInit,
    Dense,
    LayerNorm,
    Remat,
    Transformer,
    symmetric_uniform,
)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Architecture of a Vision Transformer image tower; sizes in pixels, tokens and features."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    activation: Activation = "quick_gelu"

    @property
    def tokens(self) -> int:
        """Length of the sequence: the class token and one token a patch."""
        return (self.image_size // self.patch_size) ** 2 + 1


def resize_position_embedding(table: Float[Array, "N D"], tokens: int) -> Float[Array, "M D"]:
    """Brings a position table to another resolution: bicubic over the grid, class token kept.

    Args:
        table: one row for the class token, then a square grid of patches by rows.
        tokens: rows of the new table, a square number and one.
    """
    if table.shape[0] == tokens:
        return table
    old, new = (math.isqrt(rows - 1) for rows in (table.shape[0], tokens))
    grid = rearrange(table[1:], "(h w) d -> h w d", h=old)
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "bicubic")
    return jnp.concatenate([table[:1], rearrange(grid, "h w d -> (h w) d")])


class VisionTransformer(nnx.Module):
    """Images -> embeddings, through patches and a class token.

    Raises:
        ConfigError: the patch size does not divide the image size.
    """

    def __init__(
        self, config: ViTConfig, embed_dim: int, *, dtype, remat: Remat, unroll: int, rngs: nnx.Rngs
    ):
        if config.image_size % config.patch_size:
            raise ConfigError(
                f"patches of {config.patch_size} pixels do not divide an image of "
                f"{config.image_size} pixels"
            )
        width, mlp_width = config.width, int(config.width * config.mlp_ratio)
        patch_features = 3 * config.patch_size**2
        normal = jax.nn.initializers.normal(width**-0.5)
        self.config = config
        self.dtype = dtype
        # A convolution whose stride is its kernel is a matmul on the flattened patches.
        self.patch_embedding = Dense(
            (patch_features,),
            (width,),
            kernel_init=symmetric_uniform(patch_features**-0.5),
            bias_init=None,
            dtype=dtype,
            rngs=rngs,
        )
        self.class_embedding = nnx.Param(normal(rngs.params(), (width,)))
        self.position_embedding = nnx.Param(normal(rngs.params(), (config.tokens, width)))
        self.ln_pre = LayerNorm(width, rngs=rngs)
        self.transformer = Transformer(
            width,
            config.layers,
            config.heads,
            mlp_width,
            activation=config.activation,
            causal=False,
            init=BlockInit.torch_default(width, mlp_width),
            dtype=dtype,
            remat=remat,
            unroll=unroll,
            rngs=rngs,
        )
        self.ln_post = LayerNorm(width, rngs=rngs)
        self.projection = nnx.Param(normal(rngs.params(), (width, embed_dim)))

    def __call__(self, images_BHWC: Float[Array | np.ndarray, "B H W 3"]) -> Float[Array, "B E"]:
        """Normalised pixels -> embeddings in the compute dtype, not of unit length."""
        size = self.config.image_size
        if images_BHWC.shape[1:] != (size, size, 3):
            raise ValueError(
                f"expected images of shape [B, {size}, {size}, 3], got {images_BHWC.shape}; "
                "resize them with the model's preprocess"
            )
        p, images_BHWC = self.config.patch_size, jnp.asarray(images_BHWC)
        patches_BNP = rearrange(images_BHWC, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
        x_BND = self.patch_embedding(patches_BNP)
        class_token = jnp.broadcast_to(
            self.class_embedding.astype(self.dtype), (x_BND.shape[0], 1, x_BND.shape[2])
        )
        x_BND = jnp.concatenate([class_token, x_BND], axis=1)
        x_BND = x_BND + self.position_embedding.astype(self.dtype)
        x_BND = self.transformer(self.ln_pre(x_BND))
        return self.ln_post(x_BND[:, 0]) @ self.projection.astype(self.dtype)
