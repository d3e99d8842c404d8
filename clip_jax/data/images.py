"""Encoded pictures -> uint8 squares, inside tf.data."""

import io

import numpy as np
import tensorflow as tf
from PIL import Image, UnidentifiedImageError

from clip_jax.preprocess import Preprocess


def decode(image: tf.Tensor) -> tf.Tensor:
    """JPEG, PNG, GIF (first frame), WebP or BMP bytes -> uint8 [H, W, 3]."""
    pixels = tf.cond(
        tf.io.is_jpeg(image),
        # decode_image has a JPEG transform of its own, up to 11 levels off; this is Pillow's.
        lambda: tf.io.decode_jpeg(image, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(image, channels=3, expand_animations=False),
    )
    return tf.ensure_shape(pixels, [None, None, 3])


def _to_uint8(pixels: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.clip_by_value(tf.floor(pixels + 0.5), 0, 255), tf.uint8)


def evaluation_pixels(image: tf.Tensor, preprocess: Preprocess) -> tf.Tensor:
    """The bytes of a picture -> uint8 [size, size, 3], the very pixels that `preprocess` gives.

    Pillow decodes and resizes them, outside TensorFlow's graph: TensorFlow's own decoders and
    interpolation come close, not equal, in every mode but plain RGB, and take longer.

    Raises:
        tf.errors.OpError: bytes that Pillow cannot read.
    """

    def read(data: bytes) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(data)) as picture:
                return preprocess.resize(picture)
        except UnidentifiedImageError:  # its own message is an address in memory
            raise ValueError("not a picture that Pillow can read") from None

    pixels = tf.numpy_function(read, [image], tf.uint8)
    return tf.ensure_shape(pixels, [preprocess.size, preprocess.size, 3])


def random_square_crop(
    pixels: tf.Tensor, size: int, shares: tuple[float, float], seed: tf.Tensor
) -> tf.Tensor:
    """A random square of the picture, brought to `size`; uint8 [size, size, 3].

    Args:
        pixels: uint8 [H, W, 3].
        size: of the result.
        shares: bounds of the square's side as a share of the largest square's. (1, 1) is the
            paper's augmentation: short side to `size`, then a random square.
        seed: int64 [2]; the same seed takes the same square.
    """
    shape = tf.shape(pixels)
    height, width = shape[0], shape[1]
    share, down, right = tf.unstack(tf.random.stateless_uniform([3], seed))
    largest = tf.cast(tf.minimum(height, width), tf.float32)
    side = tf.cast(tf.round(largest * (shares[0] + share * (shares[1] - shares[0]))), tf.int32)
    side = tf.clip_by_value(side, 1, tf.minimum(height, width))
    top = tf.cast(down * tf.cast(height - side + 1, tf.float32), tf.int32)
    left = tf.cast(right * tf.cast(width - side + 1, tf.float32), tf.int32)
    square = pixels[top : top + side, left : left + side]
    resized = tf.image.resize(square, [size, size], tf.image.ResizeMethod.BICUBIC, antialias=True)
    return tf.ensure_shape(_to_uint8(resized), [size, size, 3])
