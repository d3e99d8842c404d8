"""CLIP: two towers and a temperature (Radford et al., 2021, figure 3)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from clip_jax.models.layers import Remat
from clip_jax.models.text import TextConfig, TextTransformer
from clip_jax.models.vit import VisionTransformer, ViTConfig

INITIAL_TEMPERATURE = 0.07


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """The whole architecture; travels with every checkpoint as plain data."""

    embed_dim: int
    vision: ViTConfig
    text: TextConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CLIPConfig":
        """The inverse of `to_dict`."""
        return cls(
            embed_dim=values["embed_dim"],
            vision=ViTConfig(**values["vision"]),
            text=TextConfig(**values["text"]),
        )


def l2_normalize(x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
    """Unit length along the last axis, computed in float32, returned in the input's dtype."""
    x32 = x.astype(jnp.float32)
    return (x32 / jnp.linalg.norm(x32, axis=-1, keepdims=True)).astype(x.dtype)


class CLIP(nnx.Module):
    """Image and text towers that share an embedding space of `config.embed_dim` dimensions.

    Args:
        config: the architecture.
        dtype: compute dtype; parameters are float32.
        remat: what the backward pass recomputes, see `layers.Transformer`.
        unroll: layers in one turn of the loop over them, likewise.
        rngs: source of the initial parameters.
    """

    def __init__(
        self,
        config: CLIPConfig,
        *,
        dtype: Any = jnp.float32,
        remat: Remat = "none",
        unroll: int = 1,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.visual = VisionTransformer(
            config.vision, config.embed_dim, dtype=dtype, remat=remat, unroll=unroll, rngs=rngs
        )
        self.text = TextTransformer(
            config.text, config.embed_dim, dtype=dtype, remat=remat, unroll=unroll, rngs=rngs
        )
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(1 / INITIAL_TEMPERATURE)))

    def encode_image(
        self, images: Float[Array | np.ndarray, "B H W 3"], normalize: bool = False
    ) -> Float[Array, "B E"]:
        """Embeds preprocessed images (what `preprocess` returns), optionally to unit length."""
        embeddings = self.visual(images)
        return l2_normalize(embeddings) if normalize else embeddings

    def encode_text(
        self, tokens: Int[Array | np.ndarray, "B T"], normalize: bool = False
    ) -> Float[Array, "B E"]:
        """Embeds token ids (what `tokenize` returns), optionally to unit length."""
        embeddings = self.text(tokens)
        return l2_normalize(embeddings) if normalize else embeddings

    def __call__(
        self, images: Float[Array | np.ndarray, "B H W 3"], tokens: Int[Array | np.ndarray, "M T"]
    ) -> tuple[Float[Array, "B M"], Float[Array, "M B"]]:
        """The scaled cosine similarities, float32: per image and per text."""
        image_embeddings = self.encode_image(images, normalize=True)
        text_embeddings = self.encode_text(tokens, normalize=True)
        logits_per_image = jnp.exp(self.logit_scale[...]) * jnp.matmul(
            image_embeddings, text_embeddings.T, preferred_element_type=jnp.float32
        )
        return logits_per_image, logits_per_image.T
