"""CLIP: two towers and a temperature (Radford et al., 2021, figure 3)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from clip_jax.models.layers import Training
from clip_jax.models.resnet import ModifiedResNet, ResNetConfig
from clip_jax.models.text import TextConfig, TextTransformer
from clip_jax.models.transformer import Remat
from clip_jax.models.vit import VisionTransformer, ViTConfig

INITIAL_SCALE = 1 / 0.07  # of the softmax loss (paper, section 2.5)
INITIAL_SIGMOID_SCALE, INITIAL_SIGMOID_BIAS = 10.0, -10.0  # SigLIP (Zhai et al., 2023)

TOWERS = {"vit": (ViTConfig, VisionTransformer), "resnet": (ResNetConfig, ModifiedResNet)}


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """The whole architecture; travels with every checkpoint as plain data.

    Attributes:
        embed_dim: E, of both towers.
        logit_bias: the logits have a learned bias, as the sigmoid loss wants.
    """

    embed_dim: int
    vision: ViTConfig | ResNetConfig
    text: TextConfig
    logit_bias: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CLIPConfig":
        """The inverse of `to_dict`; fields that are not there take their defaults."""
        vision = dict(values["vision"])
        if "layers" in vision and not isinstance(vision["layers"], int):
            vision["layers"] = tuple(vision["layers"])  # JSON has lists only
        vision_config, _ = TOWERS[vision.get("tower", "vit")]
        return cls(
            **values | {"vision": vision_config(**vision), "text": TextConfig(**values["text"])}
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
        remat: what the backward pass recomputes, see `transformer.Transformer`.
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
        _, tower = TOWERS[config.vision.tower]
        self.visual = tower(
            config.vision, config.embed_dim, dtype=dtype, remat=remat, unroll=unroll, rngs=rngs
        )
        self.text = TextTransformer(
            config.text, config.embed_dim, dtype=dtype, remat=remat, unroll=unroll, rngs=rngs
        )
        scale = INITIAL_SIGMOID_SCALE if config.logit_bias else INITIAL_SCALE
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(scale)))
        if config.logit_bias:
            self.logit_bias = nnx.Param(jnp.float32(INITIAL_SIGMOID_BIAS))

    def encode_image(
        self,
        images: Float[Array | np.ndarray, "B H W 3"],
        normalize: bool = False,
        *,
        return_features: bool = False,
        layer: int | None = None,
        final_norm: bool = False,
        training: Training | None = None,
    ) -> Float[Array, "B *features"]:
        """Embeds preprocessed images (what `preprocess` returns), or gives the features inside.

        Args:
            images: normalised pixels.
            normalize: embeddings of unit length.
            return_features: instead of the embeddings [B, E], every token [B, N, D] of a ViT, the
                class token first where there is one, or the feature map [B, h, w, C] of a ResNet.
            layer: after which block of the ViT, or stage of the ResNet, counted as `hidden_states`
                of Hugging Face are: 0 is the input of the first, -1 (None) the output of the last.
                LLaVA takes `encode_image(x, return_features=True, layer=-2)[:, 1:]`.
            final_norm: the features go through the norm that the ViT ends with.
            training: given in training only; see `Training`.

        Raises:
            ValueError: images of another size, or no such layer.
        """
        if return_features:
            layer = -1 if layer is None else layer
            return self.visual.features(images, layer, final_norm, training)
        _only_of_features(layer, final_norm)
        embeddings = self.visual(images, training)
        return l2_normalize(embeddings) if normalize else embeddings

    def encode_text(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        normalize: bool = False,
        *,
        return_features: bool = False,
        layer: int | None = None,
        final_norm: bool = False,
    ) -> Float[Array, "B *features"]:
        """Embeds token ids (what `tokenize` returns), or gives the features inside.

        Args:
            tokens: ids, padded with zeros.
            normalize: embeddings of unit length.
            return_features: instead of the embeddings [B, E], every token [B, T, D].
            layer: after which block, counted as in `encode_image`.
            final_norm: the features go through the tower's last norm. Stable Diffusion 2 takes
                `encode_text(t, return_features=True, layer=-2, final_norm=True)`, version 1 the
                same of the last layer.

        Raises:
            ValueError: texts too long, or no such layer.
        """
        if return_features:
            return self.text.features(tokens, -1 if layer is None else layer, final_norm)
        _only_of_features(layer, final_norm)
        embeddings = self.text(tokens)
        return l2_normalize(embeddings) if normalize else embeddings

    def __call__(
        self, images: Float[Array | np.ndarray, "B H W 3"], tokens: Int[Array | np.ndarray, "M T"]
    ) -> tuple[Float[Array, "B M"], Float[Array, "M B"]]:
        """The logits, float32, per image and per text: scaled cosine similarities, biased if so."""
        image_embeddings = self.encode_image(images, normalize=True)
        text_embeddings = self.encode_text(tokens, normalize=True)
        logits_per_image = jnp.exp(self.logit_scale[...]) * jnp.matmul(
            image_embeddings, text_embeddings.T, preferred_element_type=jnp.float32
        )
        if self.config.logit_bias:
            logits_per_image += self.logit_bias[...]
        return logits_per_image, logits_per_image.T


def _only_of_features(layer: int | None, final_norm: bool) -> None:
    if layer is not None or final_norm:
        raise ValueError("layer and final_norm choose features: pass return_features=True")
