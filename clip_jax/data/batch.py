"""What the train step takes. Apart from the pipeline, so that a step needs no TensorFlow."""

from typing import Any, NamedTuple

from jaxtyping import Int32, UInt8


class Batch(NamedTuple):
    """Image-text pairs; row i of the one belongs to row i of the other."""

    image: UInt8[Any, "B H W 3"]
    tokens: Int32[Any, "B T"]
