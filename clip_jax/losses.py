"""The contrastive loss: a pure function of embeddings and scale.

The function works on the rows that one device holds; `axis_names` are the mesh axes over which the
batch is split, and the collectives go over them. Call it inside `jax.shard_map`, or with no axes on
a single device.

Axis letters: b rows of this device, N rows of the global batch, E embedding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

AxisNames = tuple[str, ...]


class _Residuals(NamedTuple):
    image_bE: Array
    text_bE: Array
    scale: Array
    image_lse_b: Array
    text_lse_b: Array


def _gather(x_b: Array, axis_names: AxisNames) -> Array:
    return jax.lax.all_gather(x_b, axis_names, tiled=True) if axis_names else x_b


def _sum(x: Array, axis_names: AxisNames) -> Array:
    return jax.lax.psum(x, axis_names) if axis_names else x


def _similarities(left_bE: Array, right_NE: Array) -> Array:
    """Cosines in float32 whatever the dtype of the embeddings."""
    return jnp.einsum("be,ne->bn", left_bE, right_NE, preferred_element_type=jnp.float32)


def _paired_similarity(image_bE: Array, text_bE: Array) -> Array:
    return jnp.sum(image_bE.astype(jnp.float32) * text_bE.astype(jnp.float32), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def softmax_loss(
    image_bE: Float[Array, "b E"],
    text_bE: Float[Array, "b E"],
    logit_scale: Float[Array, ""],
    axis_names: AxisNames = (),
) -> Float[Array, ""]:
    """The paper's symmetric cross-entropy over all N x N pairs of the global batch (figure 3).

    Args:
        image_bE: unit-length image embeddings of this device's rows, float32 or bfloat16.
        text_bE: the text embeddings of the same rows.
        logit_scale: the factor itself, exp of the learned parameter; float32.
        axis_names: mesh axes that split the batch; () when this device holds all of it.

    Returns:
        The mean of the two directions' cross-entropies, float32, the same on every device.

    Each device computes the rows of its own images against all texts and of its own texts against
    all images, so no device holds more than b x N logits; and since it keeps the log-sum-exps of
    both directions, the backward pass needs 2N further floats from the others but no reduction of
    embedding gradients. The gradient is that of the whole batch, exactly.
    """
    return _forward(image_bE, text_bE, logit_scale, axis_names)[0]


def _forward(image_bE, text_bE, scale, axis_names):
    image_lse_b = jax.nn.logsumexp(
        scale * _similarities(image_bE, _gather(text_bE, axis_names)), axis=1
    )
    text_lse_b = jax.nn.logsumexp(
        scale * _similarities(text_bE, _gather(image_bE, axis_names)), axis=1
    )
    paired_b = scale * _paired_similarity(image_bE, text_bE)
    total = _sum(jnp.sum(image_lse_b + text_lse_b - 2 * paired_b), axis_names)
    rows = _sum(jnp.float32(image_bE.shape[0]), axis_names)
    return total / (2 * rows), _Residuals(image_bE, text_bE, scale, image_lse_b, text_lse_b)


def _backward(axis_names, residuals, cotangent):
    image_bE, text_bE, scale, image_lse_b, text_lse_b = residuals
    rows = _sum(jnp.float32(image_bE.shape[0]), axis_names)

    def one_side(own_bE, other_bE, own_lse_b, other_lse_b):
        """Gradient of the own embeddings, and of the scale by the own rows of this direction."""
        other_NE = _gather(other_bE, axis_names)
        similarities_bN = _similarities(own_bE, other_NE)
        logits_bN = scale * similarities_bN
        own_softmax_bN = jnp.exp(logits_bN - own_lse_b[:, None])
        other_softmax_bN = jnp.exp(logits_bN - _gather(other_lse_b, axis_names)[None, :])
        mixed_bE = jnp.matmul(
            (own_softmax_bN + other_softmax_bN) / 2,
            other_NE.astype(jnp.float32),
            preferred_element_type=jnp.float32,
        )
        gradient_bE = scale / rows * (mixed_bE - other_bE.astype(jnp.float32))
        return gradient_bE, jnp.sum(own_softmax_bN * similarities_bN) / (2 * rows)

    image_gradient, scale_by_images = one_side(image_bE, text_bE, image_lse_b, text_lse_b)
    text_gradient, scale_by_texts = one_side(text_bE, image_bE, text_lse_b, image_lse_b)
    scale_gradient = _sum(
        scale_by_images + scale_by_texts - jnp.sum(_paired_similarity(image_bE, text_bE)) / rows,
        axis_names,
    )
    return (
        (cotangent * image_gradient).astype(image_bE.dtype),
        (cotangent * text_gradient).astype(text_bE.dtype),
        cotangent * scale_gradient,
    )


softmax_loss.defvjp(_forward, _backward)
