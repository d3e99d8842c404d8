"""Encoded pictures -> uint8 squares, in TensorFlow.

The evaluation transform is the one `clip_jax.preprocess` defines; here it runs inside tf.data.
"""

import tensorflow as tf


def decode(image: tf.Tensor) -> tf.Tensor:
    """JPEG, PNG, GIF (first frame) or BMP bytes -> uint8 [H, W, 3]."""
    pixels = tf.io.decode_image(image, channels=3, expand_animations=False)
    return tf.ensure_shape(pixels, [None, None, 3])


def _resize(pixels: tf.Tensor, height: tf.Tensor | int, width: tf.Tensor | int) -> tf.Tensor:
    """Antialiased bicubic interpolation, rounded to uint8 as Pillow does."""
    resized = tf.image.resize(
        pixels, tf.stack([height, width]), tf.image.ResizeMethod.BICUBIC, antialias=True
    )
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)


def resize_and_center_crop(pixels: tf.Tensor, size: int) -> tf.Tensor:
    """The evaluation transform: short side to `size`, then the centre; uint8 [size, size, 3]."""
    shape = tf.shape(pixels)
    height, width = shape[0], shape[1]
    short = tf.minimum(height, width)
    height, width = size * height // short, size * width // short
    resized = _resize(pixels, height, width)
    # Python and TensorFlow both round halves to even, as the released transform does.
    top = tf.cast(tf.round((height - size) / 2), tf.int32)
    left = tf.cast(tf.round((width - size) / 2), tf.int32)
    return tf.ensure_shape(
        resized[top : top + size, left : left + size], [size, size, 3]
    )


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
    return tf.ensure_shape(_resize(square, size, size), [size, size, 3])
