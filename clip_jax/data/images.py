"""Encoded pictures -> uint8 squares, in TensorFlow.

The evaluation transform is the one `clip_jax.preprocess` defines; here it runs inside tf.data.
"""

import tensorflow as tf


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


def resize_and_center_crop(pixels: tf.Tensor, size: int) -> tf.Tensor:
    """The evaluation transform: short side to `size`, then the centre; uint8 [size, size, 3].

    As in Pillow, columns are interpolated first, rounded to uint8, and rows after them. Pixels
    that the crop drops are not computed.
    """
    shape = tf.shape(pixels)
    height, width = shape[0], shape[1]
    short = tf.minimum(height, width)
    new_height, new_width = size * height // short, size * width // short
    # Python and TensorFlow both round halves to even, as the released transform does.
    top, left = tf.round((new_height - size) / 2), tf.round((new_width - size) / 2)

    def interpolate(pixels: tf.Tensor, shape: list, scale: list, offset: list) -> tf.Tensor:
        resized = tf.raw_ops.ScaleAndTranslate(
            images=pixels[None],
            size=tf.stack(shape),
            scale=tf.cast(tf.stack(scale), tf.float32),
            translation=-tf.cast(tf.stack(offset), tf.float32),
            kernel_type="keyscubic",
            antialias=True,
        )
        return _to_uint8(resized[0])

    columns = interpolate(pixels, [height, size], [1.0, new_width / width], [0.0, left])
    rows = interpolate(columns, [size, size], [new_height / height, 1.0], [top, 0.0])
    return tf.ensure_shape(rows, [size, size, 3])


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
