"""Crop and resize on the accelerator: an antialiased bicubic interpolation is two small matmuls."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

_PRECISION = jax.lax.Precision.HIGH  # levels are exact in bfloat16, weights are not
# Pictures at once. With the whole batch, the compiler for TPUs leaves arrays of the towers in
# main memory that it else holds on the chip (docs/data.md).
_AT_ONCE = 16


def canvas_size(size: int) -> int:
    """Side of the square in which a picture waits for the device, in pixels.

    A crop of a 640 x 480 photograph fits in that of 224, so that it is decoded at full scale: at
    reduced scale libjpeg's filter shows, and the more the nearer the crop is to the size.
    """
    return 2 * size + 64


def crop_resize(
    image: UInt8[Array | np.ndarray, "B P Q 3"], box: Float[Array | np.ndarray, "B 4"], size: int
) -> UInt8[Array, "B size size 3"]:
    """Cuts a box out of each picture and resizes it to a square, as `preprocess` defines it.

    Antialiased bicubic interpolation (Keys' kernel, a = -1/2, as Pillow's and TensorFlow's), which
    sees nothing outside of the box, and rounding to levels.

    Args:
        image: what lies outside of the box does not matter.
        box: top, left, height and width in pixels; edges may lie within one.
        size: of the square.
    """

    def one(picture: tuple[Array, Array]) -> Array:
        pixels, (top, left, height, width) = picture
        rows, columns, _ = pixels.shape
        down_SP = _weights(top, height, size, rows)
        across_SQ = _weights(left, width, size, columns)
        pixels = pixels.astype(jnp.float32)
        pixels = jnp.einsum("ip,pqc->iqc", down_SP, pixels, precision=_PRECISION)
        pixels = jnp.einsum("jq,iqc->ijc", across_SQ, pixels, precision=_PRECISION)
        return jnp.clip(jnp.floor(pixels + 0.5), 0, 255).astype(jnp.uint8)

    return jax.lax.map(one, (jnp.asarray(image), jnp.asarray(box)), batch_size=_AT_ONCE)


def _weights(
    start: Float[Array, ""], extent: Float[Array, ""], size: int, length: int
) -> Float[Array, "size length"]:
    """Row i: how much each of the source's pixels counts for pixel i of the result."""
    centres = start + (jnp.arange(size) + 0.5) * (extent / size)
    places = jnp.arange(length) + 0.5
    scale = jnp.maximum(extent / size, 1.0)  # enlarging needs no antialiasing
    x = jnp.abs(places - centres[:, None]) / scale
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    kernel = jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))
    kernel = jnp.where((places >= start) & (places <= start + extent), kernel, 0.0)
    return kernel / kernel.sum(1, keepdims=True)
