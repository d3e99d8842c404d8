"""Floating-point operations of the towers, counted from the architecture.

Matrix products and convolutions, two operations for each multiplication and addition, which is what
model FLOPs utilisation is made of; norms, activations and softmax are left out (about one percent).
Attention counts all pairs of tokens, also where it is causal. Of the last block of a tower that is
read at one token, what that token needs is counted (`Transformer.at`): where others count the whole
block, they have 7 % more for ViT-B, 4 % for ViT-L.
"""

from typing import NamedTuple

from clip_jax.models.clip import CLIPConfig
from clip_jax.models.resnet import EXPANSION, ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig, patches_kept


class Flops(NamedTuple):
    """Operations of one forward pass, of one image and of one text."""

    image: int
    text: int


def forward_flops(config: CLIPConfig, training: bool = False) -> Flops:
    """Operations of a forward pass, each tower for one example.

    Args:
        config: the architecture.
        training: patch dropout drops.
    """
    vision, embed_dim = config.vision, config.embed_dim
    if isinstance(vision, ResNetConfig):
        image = _resnet(vision, embed_dim)
    else:
        image = _vit(vision, embed_dim, training)
    return Flops(2 * image, 2 * _text(config.text, embed_dim))


def training_flops(config: CLIPConfig, frozen: tuple[str, ...] = ()) -> int:
    """Operations of a training step for one image-text pair, the loss and recomputation left out.

    The backward pass takes two products for each of the forward pass, of a frozen tower none.

    Args:
        config: the architecture.
        frozen: towers without gradients, of "visual" and "text".
    """
    image, text = forward_flops(config, training=True)
    return image * (1 if "visual" in frozen else 3) + text * (1 if "text" in frozen else 3)


def _transformer(tokens: int, read: int, width: int, mlp_width: int, layers: int) -> int:
    """Of all blocks, of which the last goes on with those tokens alone that are read."""
    last = _block(read, tokens, width, mlp_width)
    return (layers - 1) * _block(tokens, tokens, width, mlp_width) + last


def _block(queries: int, tokens: int, width: int, mlp_width: int) -> int:
    """Key and value of all tokens; query, out, attention and the MLP of those that ask."""
    projections = 2 * (tokens + queries) * width**2
    return projections + 2 * queries * tokens * width + 2 * queries * width * mlp_width


def _vit(config: ViTConfig, embed_dim: int, training: bool) -> int:
    width, mlp_width = config.width, int(config.width * config.mlp_ratio)
    patches = (config.image_size // config.patch_size) ** 2
    count = patches * 3 * config.patch_size**2 * width
    if training:
        patches = patches_kept(patches, config.patch_dropout)
    tokens = patches + config.class_token
    read = 1 if config.pool == "class" else tokens
    count += _transformer(tokens, read, width, mlp_width, config.layers)
    if config.pool == "map":
        count += _block(1, tokens, width, mlp_width)
    return count + (width * embed_dim if config.projection else 0)


def _text(config: TextConfig, embed_dim: int) -> int:
    width, mlp_width = config.width, int(config.width * config.mlp_ratio)
    count = _transformer(config.context_length, 1, width, mlp_width, config.layers)
    return count + (width * embed_dim if config.projection else 0)


def _resnet(config: ResNetConfig, embed_dim: int) -> int:
    width, side = config.width, config.image_size // 2
    # The stem's three convolutions run at half the image's size, the first stage at a quarter.
    count = side**2 * 9 * (3 * (width // 2) + (width // 2) ** 2 + (width // 2) * width)
    side, channels = side // 2, width
    for number, blocks in enumerate(config.layers):
        planes = width * 2**number
        for block in range(blocks):
            pooled = side // 2 if number and not block else side
            count += side**2 * (channels * planes + 9 * planes**2)
            count += pooled**2 * planes * planes * EXPANSION
            if not block:
                count += pooled**2 * channels * planes * EXPANSION
            side, channels = pooled, planes * EXPANSION
    # The attention pool: query and out of the mean alone, key and value of all.
    tokens = config.tokens
    return count + (1 + 2 * tokens) * channels**2 + 2 * tokens * channels + channels * embed_dim
