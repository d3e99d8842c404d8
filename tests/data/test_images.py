"""Pictures: decoded as Pillow does, resized as `Preprocess` does, cropped at random squares."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from clip_jax.data import images
from tests.data.records import coordinates, encode, photograph


def difference(one, other):
    """Largest and mean difference in levels of 0 to 255."""
    levels = np.abs(np.int32(one) - np.int32(other))
    return levels.max(), levels.mean()


def decode(file):
    return images.decode(tf.constant(file)).numpy()


def random_crops(pixels, size, shares, seeds):
    """A crop for each seed: uint8 [n, size, size, 3]."""
    pixels = tf.constant(pixels)
    crops = (
        tf.data.Dataset.from_tensor_slices(tf.constant(seeds, tf.int64))
        .map(lambda seed: images.random_square_crop(pixels, size, shares, seed))
        .batch(len(seeds))
    )
    return next(crops.as_numpy_iterator())


SEEDS = [(3, n) for n in range(1000)]


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (40, 40)])
def test_shares_of_one_take_the_largest_square_anywhere(height, width):
    # The paper's crop: the short side is resized to `size`, here as it is, and a square taken.
    pixels = coordinates(height, width)
    crops = random_crops(pixels, 40, (1.0, 1.0), SEEDS)
    assert crops.dtype == np.uint8
    corners = crops[:, 0, 0, :2].astype(int)
    expected = [pixels[top : top + 40, left : left + 40] for top, left in corners]
    np.testing.assert_array_equal(crops, expected)
    for positions, room in zip(corners.T, (height - 40, width - 40), strict=True):
        assert positions.min() == 0
        assert positions.max() == room
        if room:  # about 16 to a position, 200 to a fifth
            counts = np.bincount(positions, minlength=room + 1)
            assert counts.min() > 3
            assert counts.max() < 35
            fifths = [part.sum() / 1000 for part in np.array_split(counts, 5)]
            np.testing.assert_allclose(fifths, 0.2, atol=0.04)


def test_the_paper_crop_resizes_the_short_side():
    pixels = photograph(60, 60)
    (crop,) = random_crops(pixels, 24, (1.0, 1.0), [(0, 0)])
    expected = Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC)
    largest, mean = difference(crop, expected)  # Pillow rounds to whole levels in between
    assert largest <= 12
    assert mean < 0.3


def test_shares_bound_the_side_of_a_square_inside_the_picture():
    height, width, size = 120, 200, 60
    crops = random_crops(coordinates(height, width), size, (0.5, 0.9), SEEDS)
    # A picture of the coordinates stays one when it is resized, except at the edges.
    inner = crops[:, 6:-6, 6:-6, :2].astype(float)
    scale_y = (inner[:, -1, :, 0] - inner[:, 0, :, 0]).mean(1) / (size - 13)
    scale_x = (inner[:, :, -1, 1] - inner[:, :, 0, 1]).mean(1) / (size - 13)
    np.testing.assert_allclose(scale_y, scale_x, atol=0.03)  # squares, not stretched
    sides = (scale_x + scale_y) / 2 * size
    assert abs(sides.min() - 0.5 * height) < 2
    assert abs(sides.max() - 0.9 * height) < 2
    assert abs(sides.mean() - 0.7 * height) < 2
    assert abs(sides.std() - 0.4 * height / np.sqrt(12)) < 2
    centres = crops[..., :2].astype(float).mean((1, 2)) + 0.5
    for centre, room in zip(centres.T, (height, width), strict=True):
        assert np.all(centre - sides / 2 > -1.5)
        assert np.all(centre + sides / 2 < room + 1.5)
        free = (centre - sides / 2) / (room - sides)  # 0 to 1: all the way
        np.testing.assert_allclose(np.quantile(free, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.06)
    # Size and place have nothing to do with each other, nor do the two directions.
    correlations = np.corrcoef([sides, centres[:, 0], centres[:, 1]])
    assert np.abs(correlations - np.eye(3)).max() < 0.12


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (2, 3)])
def test_tiny_pictures_and_shares_leave_at_least_a_pixel(height, width):
    crops = random_crops(photograph(height, width), 8, (0.01, 0.5), SEEDS[:20])
    assert crops.shape == (20, 8, 8, 3)


def test_the_seed_decides_the_crop():
    pixels = photograph(50, 80)
    seeds = [(1, 2), (2, 1), (1, 2), (1, 3), (0, 0)]
    crops = random_crops(pixels, 16, (0.3, 1.0), seeds)
    np.testing.assert_array_equal(crops[0], crops[2])
    assert len({crop.tobytes() for crop in crops}) == 4


PIXELS = photograph(30, 41)
FILES = {
    "JPEG": encode(PIXELS, "JPEG"),
    "JPEG of high quality": encode(PIXELS, "JPEG", quality=98, subsampling=0),
    "JPEG, progressive": encode(PIXELS, "JPEG", progressive=True),
    "JPEG, grey": encode(PIXELS, "JPEG", mode="L"),
    "PNG": encode(PIXELS),
    "PNG, grey": encode(PIXELS, mode="L"),
    "PNG, grey with alpha": encode(PIXELS, mode="LA"),
    "PNG, RGBA": encode(PIXELS, mode="RGBA"),
    "PNG, palette": encode(PIXELS, mode="P"),
    "PNG, black and white": encode(PIXELS, mode="1"),
    "GIF": encode(PIXELS, "GIF", mode="P"),
    "WebP": encode(PIXELS, "WEBP", lossless=True),
    "BMP": encode(PIXELS, "BMP"),
    "BMP, grey": encode(PIXELS, "BMP", mode="L"),
    "BMP, RGBA": encode(PIXELS, "BMP", mode="RGBA"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_decode_to_the_very_pixels_that_pillow_gives(name):
    expected = np.asarray(Image.open(io.BytesIO(FILES[name])).convert("RGB"))
    result = decode(FILES[name])
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)


def test_cmyk_is_converted_to_rgb():
    file = encode(PIXELS, "JPEG", mode="CMYK", quality=98)
    expected = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    assert difference(decode(file), expected)[0] <= 2


def test_16_bits_keep_the_upper_eight():
    levels = np.arange(30 * 41, dtype=np.uint16).reshape(30, 41) * 53
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    result = decode(file.getvalue())
    np.testing.assert_array_equal(result, np.repeat((levels >> 8)[..., None], 3, -1))


def test_the_first_frame_of_an_animation_counts():
    file = io.BytesIO()
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    result = decode(file.getvalue())
    np.testing.assert_array_equal(result, np.full((7, 9, 3), (255, 0, 0)))


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"garbage",
        b"\xff\xd8\xff",
        FILES["JPEG"][: len(FILES["JPEG"]) // 2],
        FILES["PNG"][: len(FILES["PNG"]) // 2],
        FILES["GIF"][: len(FILES["GIF"]) // 2],
        FILES["WebP"][: len(FILES["WebP"]) // 2],
        FILES["BMP"][: len(FILES["BMP"]) // 2],
        encode(PIXELS, "TIFF"),
    ],
    ids=["nothing", "garbage", "header", "JPEG", "PNG", "GIF", "WebP", "BMP", "TIFF"],
)
def test_what_is_no_picture_or_half_of_one_raises(file):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(file)
