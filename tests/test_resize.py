"""Crop and resize on the device, against TensorFlow's antialiased bicubic interpolation."""

import jax
import numpy as np
import pytest
import tensorflow as tf

from clip_jax.resize import crop_resize
from tests.data.records import photograph


def reference(pixels, size):
    resized = tf.image.resize(pixels, [size, size], "bicubic", antialias=True).numpy()
    return np.clip(np.floor(resized + 0.5), 0, 255)


@pytest.mark.parametrize("size", [7, 32, 60])
def test_boxes_become_the_pixels_that_the_host_makes_of_them(size):
    pixels = photograph(90, 110)
    boxes = [(0, 0, 90, 90), (3, 5, 40, 40), (10, 20, 60, 90), (89, 0, 1, 110), (30, 30, 60, 60)]
    images = np.stack([pixels] * len(boxes))
    found = np.asarray(jax.jit(crop_resize, static_argnums=2)(images, np.float32(boxes), size))
    assert found.dtype == np.uint8
    for result, (top, left, height, width) in zip(found, boxes, strict=True):
        expected = reference(pixels[top : top + height, left : left + width], size)
        difference = np.abs(result - expected)
        assert difference.max() <= 1  # where rounding decides
        assert difference.mean() < 0.01


def test_a_box_of_the_size_itself_is_cut_out_exactly():
    pixels = photograph(40, 50)
    (found,) = np.asarray(crop_resize(pixels[None], np.float32([[4, 6, 24, 24]]), 24))
    np.testing.assert_array_equal(found, pixels[4:28, 6:30])


def test_nothing_outside_of_the_box_is_seen():
    pixels = photograph(40, 50)
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    noise[10:30, 5:45] = pixels[10:30, 5:45]
    images, boxes = np.stack([pixels, noise]), np.float32([[10, 5, 20, 40]] * 2)
    one, other = np.asarray(crop_resize(images, boxes, 16))
    np.testing.assert_array_equal(one, other)


def test_edges_within_a_pixel_move_the_picture_by_that_much():
    ramp = np.tile(np.arange(0, 240, 4, np.uint8)[:, None, None], (1, 60, 3))
    boxes = np.float32([[10, 10, 40, 40], [10.5, 10, 40, 40]])
    one, other = np.asarray(crop_resize(np.stack([ramp] * 2), boxes, 20)).astype(int)
    np.testing.assert_array_equal((other - one)[1:-1], 2)  # half a pixel of four levels
