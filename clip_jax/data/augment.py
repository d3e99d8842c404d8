"""Augmentation: pure functions of a picture and of numbers drawn for its ticket.

`draw_box` chooses the part of the picture, `recolor` changes its colours. Every record has `DRAWS`
uniform numbers of its own, each with one use, so that switching one option on changes no other.
"""

import math
from typing import Any, NamedTuple

import tensorflow as tf
from ml_collections import ConfigDict

from clip_jax.data.images import to_uint8
from clip_jax.errors import DataError

_ATTEMPTS = 10  # of the random resized crop, as in torchvision
CAPTION = 0
_BOX = 1  # share and place of the square, or areas, ratios and place of the rectangle
_COLOR = _BOX + 2 * _ATTEMPTS + 2  # whether, four strengths, four ranks
_GRAY = _COLOR + 9
DRAWS = _GRAY + 1


class Augmentation(NamedTuple):
    """The options of `config.data`, checked."""

    crop: tuple[float, float]
    resized_crop: tuple[float, float] | None
    crop_ratio: tuple[float, float]
    color_jitter: tuple[float, float, float, float]
    color_jitter_prob: float
    gray_prob: float

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Augmentation":
        """Takes the options from the `data` section.

        Raises:
            DataError: shares or probabilities out of their range.
        """
        options = cls(*(_plain(config[name]) for name in cls._fields))
        for name in ("crop", "resized_crop", "crop_ratio"):
            bounds = getattr(options, name)
            limit = math.inf if name == "crop_ratio" else 1
            if bounds is not None and not (
                len(bounds) == 2 and 0 < bounds[0] <= bounds[1] <= limit
            ):
                raise DataError(
                    f"config.data.{name}={bounds}; expected 0 < lower <= upper <= {limit}"
                )
        if len(options.color_jitter) != 4 or min(options.color_jitter) < 0:
            raise DataError(
                f"config.data.color_jitter={options.color_jitter}; expected four strengths, of "
                "brightness, contrast, saturation and hue"
            )
        return options


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (tuple, list)) else value


def draw_box(size: tf.Tensor, options: Augmentation, draws: tf.Tensor) -> tf.Tensor:
    """The part of a picture that a record is cropped to.

    Args:
        size: int32 [2], height and width.
        options: `resized_crop` bounds the area of a rectangle, as a share of the picture's, and
            `crop_ratio` its width by height (torchvision's RandomResizedCrop). Without it, `crop`
            bounds the side of a square, as a share of the largest square's; (1, 1) is the paper's.
        draws: float32 [DRAWS].

    Returns:
        int32 [4]: top, left, height, width.
    """
    if options.resized_crop is None:
        share, down, right = tf.unstack(draws[_BOX : _BOX + 3])
        largest = tf.reduce_min(size)
        lower, upper = options.crop
        side = tf.cast(
            tf.round(tf.cast(largest, tf.float32) * (lower + share * (upper - lower))), tf.int32
        )
        sides = tf.repeat(tf.clip_by_value(side, 1, largest), 2)
        place = tf.stack([down, right])
    else:
        sides, place = _resized_crop(size, options.resized_crop, options.crop_ratio, draws[_BOX:])
    corner = tf.cast(place * tf.cast(size - sides + 1, tf.float32), tf.int32)
    return tf.concat([tf.minimum(corner, size - sides), sides], 0)


def _resized_crop(
    size: tf.Tensor, scale: tuple[float, float], ratio: tuple[float, float], draws: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Height and width [2] of the first attempt that fits, and where between the edges [2]."""
    height_width = tf.cast(size, tf.float32)
    area = tf.reduce_prod(height_width) * (scale[0] + draws[:_ATTEMPTS] * (scale[1] - scale[0]))
    logs = math.log(ratio[0]), math.log(ratio[1])
    aspect = tf.exp(logs[0] + draws[_ATTEMPTS : 2 * _ATTEMPTS] * (logs[1] - logs[0]))
    tries = tf.cast(tf.round(tf.sqrt(tf.stack([area / aspect, area * aspect], 1))), tf.int32)
    fits = tf.reduce_all((tries > 0) & (tries <= size), 1)
    # None fits: the largest part in the middle whose ratio is within the bounds.
    own = height_width[1] / height_width[0]
    bounded = tf.clip_by_value(own, ratio[0], ratio[1])
    largest = tf.where(
        own < ratio[0],
        tf.stack([height_width[1] / bounded, height_width[1]]),
        tf.stack([height_width[0], height_width[0] * bounded]),
    )
    largest = tf.clip_by_value(tf.cast(tf.round(largest), tf.int32), 1, size)
    any_fits = tf.reduce_any(fits)
    sides = tf.where(any_fits, tries[tf.argmax(tf.cast(fits, tf.int32))], largest)
    place = tf.where(any_fits, draws[2 * _ATTEMPTS : 2 * _ATTEMPTS + 2], [0.5, 0.5])
    return sides, place


def recolor(pixels: tf.Tensor, options: Augmentation, draws: tf.Tensor) -> tf.Tensor:
    """Colour jitter and grey scale, each with its probability: uint8 [H, W, 3] -> the same.

    Strengths and the random order of the four changes are torchvision's ColorJitter.
    """
    if any(options.color_jitter) and options.color_jitter_prob > 0:
        pixels = tf.cond(
            draws[_COLOR] < options.color_jitter_prob,
            lambda: _jitter(pixels, options.color_jitter, draws[_COLOR + 1 : _COLOR + 9]),
            lambda: pixels,
        )
    if options.gray_prob > 0:
        pixels = tf.cond(
            draws[_GRAY] < options.gray_prob,
            lambda: to_uint8(tf.repeat(_luma(tf.cast(pixels, tf.float32)), 3, -1)),
            lambda: pixels,
        )
    return pixels


def _jitter(
    pixels: tf.Tensor, strengths: tuple[float, float, float, float], draws: tf.Tensor
) -> tf.Tensor:
    def between(draw: tf.Tensor, strength: float) -> tf.Tensor:
        low = max(0.0, 1 - strength)
        return low + draw * (1 + strength - low)

    def blend(image: tf.Tensor, other: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
        return tf.clip_by_value(factor * image + (1 - factor) * other, 0, 255)

    brightness, contrast, saturation = (between(draws[i], strengths[i]) for i in range(3))
    hue = (2 * draws[3] - 1) * strengths[3]
    changes = [
        lambda image: blend(image, tf.zeros_like(image), brightness),
        lambda image: blend(image, tf.reduce_mean(_luma(image)), contrast),
        lambda image: blend(image, _luma(image), saturation),
        lambda image: tf.image.adjust_hue(image / 255, hue) * 255,
    ]
    used = [change for change, strength in zip(changes, strengths, strict=True) if strength]
    image = tf.cast(pixels, tf.float32)
    for place in tf.unstack(tf.argsort(draws[4 : 4 + len(used)])):
        image = tf.switch_case(place, [lambda c=c, image=image: c(image) for c in used])
    return to_uint8(image)


def _luma(image: tf.Tensor) -> tf.Tensor:
    """Rec. 601, float32 [H, W, 1]."""
    return tf.tensordot(image, tf.constant([0.299, 0.587, 0.114]), 1)[..., None]


def choose_caption(captions: tf.Tensor, weights: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """One of the captions [K] that have a word in them, by their weights [K].

    Raises:
        tf.errors.InvalidArgumentError: there is none.
    """
    weights = tf.where(has_words(captions), weights, 0)
    total = tf.cumsum(weights)
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_sum(weights) > 0, ["no caption"])]):
        chosen = tf.searchsorted(total, [draws[CAPTION] * total[-1]], side="right")[0]
        last = tf.reduce_max(tf.where(weights > 0, tf.range(tf.size(weights)), 0))
    return captions[tf.minimum(chosen, last)]


def has_words(captions: tf.Tensor) -> tf.Tensor:
    """Whether there is anything but white space, control characters and nothing: bool [K]."""
    return tf.logical_not(tf.strings.regex_full_match(captions, r"[\s\pZ\p{Cc}\x00]*"))
