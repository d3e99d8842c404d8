"""Position tables at another resolution.

A table has one row for the class token (a ViT's) or the mean (a ResNet's attention pool) where
there is one, then a square grid by rows.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.vit import ViTConfig


def resize_position_embedding(
    table: Float[Array, "N D"], tokens: int, prefix: int = 1
) -> Float[Array, "M D"]:
    """Brings a position table to another number of rows: antialiased bicubic over the grid.

    Args:
        table: `prefix` rows that are kept as they are, then the grid.
        tokens: rows of the new table, a square number and `prefix`.
        prefix: rows before the grid, 0 or 1.
    """
    if table.shape[0] == tokens:
        return table
    old, new = (math.isqrt(rows - prefix) for rows in (table.shape[0], tokens))
    grid = rearrange(table[prefix:], "(h w) d -> h w d", h=old)
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "bicubic")
    return jnp.concatenate([table[:prefix], rearrange(grid, "h w d -> (h w) d")])


def resize_positions(
    params: Any, old: ViTConfig | ResNetConfig, new: ViTConfig | ResNetConfig
) -> Any:
    """Parameters of a `CLIP` for another resolution; all but the image position table stays.

    Args:
        params: nested dicts of arrays, as in the train state.
        old: what the parameters are of.
        new: the same at another `image_size` (or patch size).

    Returns:
        A new tree; `params` itself where old and new have equally many tokens.
    """
    if old.tokens == new.tokens or old.tower != new.tower:
        return params
    visual = params["visual"]
    if isinstance(old, ResNetConfig):
        table = resize_position_embedding(visual["pool"]["position_embedding"], new.tokens)
        resized = {"pool": visual["pool"] | {"position_embedding": table}}
    else:
        table = resize_position_embedding(
            visual["position_embedding"], new.tokens, int(old.class_token)
        )
        resized = {"position_embedding": table}
    return params | {"visual": visual | resized}
