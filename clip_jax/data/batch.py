"""What the train step takes. Apart from the pipeline, so that a step needs no TensorFlow."""

from typing import Any, NamedTuple

from jaxtyping import Float32, Int32, UInt8


class Batch(NamedTuple):
    """Image-text pairs; row i of the one belongs to row i of the other.

    With `box` (top, left, height, width), the pictures are yet to be cropped and resized:
    `clip_jax.resize.crop_resize`.
    """

    image: UInt8[Any, "B H W 3"]
    tokens: Int32[Any, "B T"]
    box: Float32[Any, "B 4"] | None = None
