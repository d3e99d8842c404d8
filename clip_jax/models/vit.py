"""The image tower: a Vision Transformer as in the paper (section 2.4 and the released code)."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from clip_jax.errors import ConfigError
from clip_jax.models.attention import Attention
from clip_jax.models.layers import (
    MLP,
    Activation,
    Dense,
    LayerNorm,
    Training,
    check_images,
    normal,
    symmetric_uniform,
)
from clip_jax.models.products import add, matmul
from clip_jax.models.transformer import BlockInit, BlockSpec, Remat, Transformer


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Architecture of a Vision Transformer image tower; sizes in pixels, tokens and features.

    Attributes:
        pool: what stands for the image: the class token; the mean of the patches; or "map", an
            attention whose query is learned (big_vision's multihead attention pooling).
        class_token: there is one, before the patches.
        pre_norm: a LayerNorm before the first block.
        patch_bias: the patches are embedded with a bias.
        projection: a matrix leads from the width to the embedding; without it they are equal.
        patch_dropout: the share of the patches that training drops, at random, for each image anew.
        margin: an image may be larger than its patches together: what lies right of and below the
            last whole ones is left out, as a convolution does (SigLIP so400m/14 at 384 pixels).
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    activation: Activation = "quick_gelu"
    pool: Literal["class", "mean", "map"] = "class"
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False
    projection: bool = True
    norm_epsilon: float = 1e-5
    patch_dropout: float = 0.0
    margin: bool = False
    tower: Literal["vit"] = "vit"

    @property
    def tokens(self) -> int:
        """Length of the sequence: one token a patch, and the class token where there is one."""
        return (self.image_size // self.patch_size) ** 2 + self.class_token


class MAPPool(nnx.Module):
    """Multihead attention pooling: a learned query asks all tokens, then an MLP with a residual."""

    def __init__(self, spec: BlockSpec, *, dtype: Any, rngs: nnx.Rngs):
        probe = symmetric_uniform((6 / (1 + spec.width)) ** 0.5)
        self.probe = nnx.Param(probe(rngs.params(), (spec.width,)))
        self.attention = Attention(
            spec.width, spec.heads, init=spec.init.attention, dtype=dtype, rngs=rngs
        )
        self.ln = LayerNorm(spec.width, spec.norm_epsilon, rngs=rngs)
        self.mlp = MLP(
            spec.width,
            spec.mlp_width,
            activation=spec.activation,
            init=spec.init.mlp,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x_BND: Float[Array, "B N D"]) -> Float[Array, "B D"]:
        queries_B1D = jnp.broadcast_to(self.probe[...], (x_BND.shape[0], 1, x_BND.shape[2]))
        x_B1D = self.attention(x_BND, queries_B1D.astype(x_BND.dtype))
        return (x_B1D + self.mlp(self.ln(x_B1D)))[:, 0]


class VisionTransformer(nnx.Module):
    """Images -> embeddings, through patches.

    Raises:
        ConfigError: the patch size does not divide the image size, or the parts do not fit.
    """

    def __init__(
        self,
        config: ViTConfig,
        embed_dim: int,
        *,
        dtype: Any,
        remat: Remat,
        unroll: int,
        rngs: nnx.Rngs,
    ):
        _check(config, embed_dim)
        width, mlp_width = config.width, int(config.width * config.mlp_ratio)
        patch_features = 3 * config.patch_size**2
        self.config = config
        self.dtype = dtype
        # A convolution whose stride is its kernel is a matmul on the flattened patches.
        torch_default = symmetric_uniform(patch_features**-0.5)
        self.patch_embedding = Dense(
            (patch_features,),
            (width,),
            kernel_init=torch_default,
            bias_init=torch_default if config.patch_bias else None,
            dtype=dtype,
            rngs=rngs,
        )
        scaled = normal(width**-0.5)
        if config.class_token:
            self.class_embedding = nnx.Param(scaled(rngs.params(), (width,)))
        self.position_embedding = nnx.Param(scaled(rngs.params(), (config.tokens, width)))
        if config.pre_norm:
            self.ln_pre = LayerNorm(width, config.norm_epsilon, rngs=rngs)
        spec = BlockSpec(
            width,
            config.heads,
            mlp_width,
            activation=config.activation,
            norm_epsilon=config.norm_epsilon,
            init=BlockInit.torch_default(width, mlp_width),
        )
        self.transformer = Transformer(
            spec, config.layers, dtype=dtype, remat=remat, unroll=unroll, rngs=rngs
        )
        self.ln_post = LayerNorm(width, config.norm_epsilon, rngs=rngs)
        if config.pool == "map":
            spec = dataclasses.replace(spec, init=BlockInit.xavier(width, mlp_width))
            self.pool = MAPPool(spec, dtype=dtype, rngs=rngs)
        if config.projection:
            self.projection = nnx.Param(scaled(rngs.params(), (width, embed_dim)))

    def __call__(
        self, images_BHWC: Float[Array | np.ndarray, "B H W 3"], training: Training | None = None
    ) -> Float[Array, "B E"]:
        """Normalised pixels -> embeddings in the compute dtype, not of unit length."""
        x_BD = self.pooled(images_BHWC, training)
        return matmul(x_BD, self.projection[...]) if self.config.projection else x_BD

    def pooled(
        self, images_BHWC: Float[Array | np.ndarray, "B H W 3"], training: Training | None = None
    ) -> Float[Array, "B D"]:
        """The feature of each image before the projection: what the paper's linear probes take."""
        if self.config.pool == "class":
            return self.ln_post(self.transformer.at(self._embed(images_BHWC, training), 0))
        x_BND = self.features(images_BHWC, training=training)
        if self.config.pool == "map":
            return self.pool(self.ln_post(x_BND))
        return self.ln_post(jnp.mean(x_BND[:, int(self.config.class_token) :], axis=1))

    def features(
        self,
        images_BHWC: Float[Array | np.ndarray, "B H W 3"],
        layer: int = -1,
        final_norm: bool = False,
        training: Training | None = None,
    ) -> Float[Array, "B N D"]:
        """Every token after `layer` blocks; see `CLIP.encode_image`."""
        x_BND = self.transformer(self._embed(images_BHWC, training), layer)
        return self.ln_post(x_BND) if final_norm else x_BND

    def _embed(
        self, images_BHWC: Float[Array | np.ndarray, "B H W 3"], training: Training | None
    ) -> Float[Array, "B N D"]:
        """What goes into the first block: the class token where there is one, and the patches."""
        p, images_BHWC = self.config.patch_size, check_images(images_BHWC, self.config.image_size)
        covered = self.config.image_size // p * p
        images_BHWC = images_BHWC[:, :covered, :covered]
        patches_BNP = rearrange(images_BHWC, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
        positions_ND = self.position_embedding[...]
        first = int(self.config.class_token)
        x_BND = add(self.patch_embedding(patches_BNP), positions_ND[first:])
        if training is not None and self.config.patch_dropout:
            x_BND = drop_patches(x_BND, training.image_keys, self.config.patch_dropout)
        if self.config.class_token:
            class_token = self.class_embedding[...] + positions_ND[0]
            class_token = jnp.broadcast_to(class_token, (x_BND.shape[0], 1, x_BND.shape[2]))
            x_BND = jnp.concatenate([class_token.astype(self.dtype), x_BND], axis=1)
        return self.ln_pre(x_BND) if self.config.pre_norm else x_BND


def patches_kept(patches: int, share: float) -> int:
    """How many patches are left when `share` of them is dropped: at least one."""
    return max(1, int(patches * (1 - share)))


def drop_patches(
    x_BND: Float[Array, "B N D"], image_keys: Array | None, share: float
) -> Float[Array, "B M D"]:
    """Keeps a random (1 - share) of each image's patches (FLIP: Li et al., 2023).

    Args:
        x_BND: embedded patches, positions added.
        image_keys: [B], a random key for each image; the same key keeps the same patches.
        share: of the patches to drop.

    Raises:
        ValueError: no keys.
    """
    if image_keys is None:
        raise ValueError("patch dropout needs Training.image_keys, a random key for each image")
    patches = x_BND.shape[1]
    kept = patches_kept(patches, share)
    scores_BN = jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(image_keys)
    kept_BM = jax.lax.top_k(scores_BN, kept)[1]
    return jnp.take_along_axis(x_BND, kept_BM[:, :, None], axis=1)


def _check(config: ViTConfig, embed_dim: int) -> None:
    if config.image_size < config.patch_size or (
        config.image_size % config.patch_size and not config.margin
    ):
        raise ConfigError(
            f"patches of {config.patch_size} pixels do not divide an image of "
            f"{config.image_size} pixels"
        )
    if config.pool == "class" and not config.class_token:
        raise ConfigError("vision.pool='class' needs vision.class_token=True, or another pool")
    if not config.projection and config.width != embed_dim:
        raise ConfigError(
            f"vision.projection=False makes the width the embedding: expected embed_dim "
            f"{config.width}, got {embed_dim}"
        )
    if not 0 <= config.patch_dropout < 1:
        raise ConfigError(
            f"vision.patch_dropout={config.patch_dropout}: expected a share, at least 0 and below 1"
        )
