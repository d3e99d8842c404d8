"""Stochastic rounding to bfloat16, and parameters that are stored so."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def stochastic_round(x: Float[Array, "*shape"], key: Array) -> Float[Array, "*shape"]:
    """Rounds float32 to one of the two neighbours in bfloat16, so that the mean is x.

    The nearer neighbour is the more probable. What bfloat16 has stays as it is, and so do
    infinities and NaN.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # bfloat16 is the upper half of float32: a carry out of the lower half is one unit up.
    carried = jax.lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), carried, x.astype(jnp.bfloat16))


def apply_updates(params: Any, updates: Any, key: Array) -> Any:
    """Adds the updates in float32; parameters in bfloat16 are rounded stochastically."""
    leaves, structure = jax.tree.flatten(params)

    def apply(param: Array, update: Array, number: int) -> Array:
        exact = param.astype(jnp.float32) + update.astype(jnp.float32)
        if param.dtype == jnp.float32:
            return exact
        return stochastic_round(exact, jax.random.fold_in(key, number))

    applied = [
        apply(param, update, number)
        for number, (param, update) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True))
    ]
    return jax.tree.unflatten(structure, applied)
