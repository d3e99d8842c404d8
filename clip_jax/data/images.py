"""Encoded pictures -> uint8 pixels, inside tf.data."""

from typing import Any

import numpy as np
import tensorflow as tf

from clip_jax.resize import canvas_size

UNKNOWN_FORMAT = "Unknown image file format"  # TensorFlow's own words
_HEADER_BYTES = 32
_SCALES = (2, 4, 8)  # denominators that libjpeg decodes at


def read_size(image: tf.Tensor) -> tf.Tensor:
    """Height and width by the header alone, int32 [2]; nothing is decoded.

    Raises:
        tf.errors.InvalidArgumentError: neither JPEG, PNG, GIF, WebP nor BMP.
    """
    return tf.cond(
        tf.io.is_jpeg(image),
        lambda: tf.io.extract_jpeg_shape(image)[:2],
        lambda: _read_size_of_others(image),
    )


def _read_size_of_others(image: tf.Tensor) -> tf.Tensor:
    # A few operations on tables, because every one of them costs time for every picture.
    header = tf.strings.substr(image, 0, _HEADER_BYTES)
    filled = tf.strings.join([header, tf.constant(bytes(_HEADER_BYTES + 1))])
    octets = tf.cast(tf.io.decode_raw(filled, tf.uint8)[: _HEADER_BYTES + 1], tf.int64)
    magic, is_magic, places, divisor, modulus, addend = map(tf.constant, _HEADERS)
    matches = tf.reduce_all((octets[:16] == magic) | ~is_magic, 1)
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_any(matches), [UNKNOWN_FORMAT])]):
        chosen = tf.argmax(tf.cast(matches, tf.int32))
    numbers = tf.reduce_sum(tf.gather(octets, places[chosen]) * 256 ** np.arange(4), 1)
    return tf.cast(numbers // divisor[chosen] % modulus[chosen] + addend[chosen], tf.int32)


def _headers() -> tuple[Any, ...]:
    """By format: its first bytes, and where its height and width are, the lowest byte first.

    Returns:
        The bytes [F, 16] and which of them count; the places of the two numbers' bytes [F, 2, 4];
        and by which a number is divided, then taken modulo, and what is added [F, 2].
    """
    zero = _HEADER_BYTES  # the place of a byte that is 0
    webp, all_bits, low = b"RIFF????WEBPVP8", (1, 2**32, 0), (1, 2**14, 0)
    table: list[tuple[bytes, tuple[int, ...], tuple[int, ...], tuple, tuple]] = [
        (b"\x89PNG\r\n\x1a\n", (23, 22, 21, 20), (19, 18, 17, 16), all_bits, all_bits),
        (b"GIF8", (8, 9), (6, 7), all_bits, all_bits),
        (b"BM", (22, 23, 24, 25), (18, 19, 20, 21), all_bits, all_bits),
        (webp + b" ", (28, 29), (26, 27), low, low),
        (webp + b"L", (21, 22, 23, 24), (21, 22, 23, 24), (2**14, 2**14, 1), (1, 2**14, 1)),
        (webp + b"X", (27, 28, 29), (24, 25, 26), (1, 2**24, 1), (1, 2**24, 1)),
    ]
    first = np.array([list(magic.ljust(16, b"?")) for magic, *_ in table])
    places = [[(*place, zero, zero, zero)[:4] for place in row[1:3]] for row in table]
    rules = np.array([row[3:] for row in table], np.int64)
    return first, first != ord("?"), np.array(places), *np.moveaxis(rules, 2, 0)


_HEADERS = _headers()


def within(size: tf.Tensor, max_pixels: int) -> tf.Tensor:
    """The size [2]; raises if a picture of it is empty or holds more than `max_pixels`.

    Raises:
        tf.errors.InvalidArgumentError: it does.
    """
    pixels = tf.reduce_prod(tf.cast(size, tf.int64))
    good = (tf.reduce_min(size) > 0) & (pixels <= max_pixels)
    with tf.control_dependencies([tf.debugging.Assert(good, ["picture of size", size])]):
        return tf.identity(size)


def decode_box(image: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """A part of a picture; of a JPEG only that part is decoded.

    Args:
        image: encoded bytes.
        box: int32 [4], top, left, height and width in pixels, within the picture.

    Returns:
        uint8 [height, width, 3].
    """
    pixels = tf.cond(
        tf.io.is_jpeg(image),
        lambda: tf.io.decode_and_crop_jpeg(image, box, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.slice(decode(image), [box[0], box[1], 0], [box[2], box[3], 3]),
    )
    return tf.ensure_shape(pixels, [None, None, 3])


def decode(image: tf.Tensor) -> tf.Tensor:
    """JPEG, PNG, GIF (first frame), WebP or BMP bytes -> uint8 [H, W, 3]."""
    pixels = tf.cond(
        tf.io.is_jpeg(image),
        # decode_image has a JPEG transform of its own, up to 11 levels off; this is Pillow's.
        lambda: tf.io.decode_jpeg(image, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(image, channels=3, expand_animations=False),
    )
    return tf.ensure_shape(pixels, [None, None, 3])


def to_uint8(pixels: tf.Tensor) -> tf.Tensor:
    """Rounds levels, halves up, and clips them to 0 and 255."""
    return tf.cast(tf.clip_by_value(tf.floor(pixels + 0.5), 0, 255), tf.uint8)


def resize(pixels: tf.Tensor, size: int) -> tf.Tensor:
    """Antialiased bicubic interpolation to a square: uint8 [H, W, 3] -> uint8 [size, size, 3]."""
    resized = tf.image.resize(pixels, [size, size], tf.image.ResizeMethod.BICUBIC, antialias=True)
    return tf.ensure_shape(to_uint8(resized), [size, size, 3])


def decode_canvas(
    image: tf.Tensor, size: tf.Tensor, box: tf.Tensor, target: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """A part of a picture to be resized on the device, by `clip_jax.resize.crop_resize`.

    A JPEG is decoded at 1/2, 1/4 or 1/8 where the part is larger than the canvas. What does not fit
    all the same is resized here.

    Args:
        image: encoded bytes.
        size: int32 [2], the picture's height and width.
        box: int32 [4], as `decode_box` takes it.
        target: side of the square that it will be resized to.

    Returns:
        uint8 [h, w, 3], no side longer than `canvas_size(target)`; and where in it the part lies,
        float32 [4].
    """
    canvas = canvas_size(target)
    corner, sides = box[:2], box[2:]

    def at_scale(scale: int) -> tuple[tf.Tensor, tf.Tensor]:
        first = corner // scale
        last = tf.minimum(-(-(corner + sides) // scale), -(-size // scale))
        window = tf.concat([first, last - first], 0)
        pixels = tf.io.decode_and_crop_jpeg(
            image, window, channels=3, ratio=scale, dct_method="INTEGER_ACCURATE"
        )
        exact = tf.cast(box, tf.float32) / scale
        return pixels, exact - tf.cast(tf.concat([first, [0, 0]], 0), tf.float32)

    def whole() -> tuple[tf.Tensor, tf.Tensor]:
        return decode_box(image, box), tf.cast(tf.concat([[0, 0], sides], 0), tf.float32)

    def resized() -> tuple[tf.Tensor, tf.Tensor]:
        pixels = resize(decode_box(image, box), target)
        return pixels, tf.constant([0, 0, target, target], tf.float32)

    longest = tf.reduce_max(sides)
    fits = [longest <= canvas] + [longest <= (canvas - 1) * scale for scale in _SCALES]
    jpeg = tf.io.is_jpeg(image)
    branch = tf.argmax(tf.cast([fits[0], *(jpeg & fit for fit in fits[1:]), True], tf.int32))
    branches = [whole, *(lambda scale=scale: at_scale(scale) for scale in _SCALES), resized]
    pixels, place = tf.switch_case(tf.cast(branch, tf.int32), branches)
    return tf.ensure_shape(pixels, [None, None, 3]), tf.ensure_shape(place, [4])
