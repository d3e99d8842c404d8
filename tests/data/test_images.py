"""Pictures: decoded as Pillow does, resized as `Preprocess` does, cropped at random squares."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance

from clip_jax.data import images
from clip_jax.data.augment import DRAWS, Augmentation, draw_box, recolor
from clip_jax.data.draws import uniforms
from clip_jax.resize import crop_resize
from tests.data.records import coordinates, encode, photograph


def difference(one, other):
    """Largest and mean difference in levels of 0 to 255."""
    levels = np.abs(np.int32(one) - np.int32(other))
    return levels.max(), levels.mean()


def decode(file):
    return images.decode(tf.constant(file)).numpy()


OPTIONS = Augmentation((1.0, 1.0), None, (3 / 4, 4 / 3), (0, 0, 0, 0), 0.8, 0.0)


def random_crops(pixels, size, shares, seeds):
    """A crop for each seed: uint8 [n, size, size, 3]."""
    pixels = tf.constant(pixels)
    options = OPTIONS._replace(crop=shares)

    def crop(draws):
        top, left, height, width = tf.unstack(draw_box(tf.shape(pixels)[:2], options, draws))
        return images.resize(pixels[top : top + height, left : left + width], size)

    draws = np.stack([uniforms(DRAWS, *seed) for seed in seeds])
    crops = tf.data.Dataset.from_tensor_slices(draws).map(crop).batch(len(seeds))
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


def boxes(height, width, count=2_000, **options):
    """int32 [count, 4]."""
    options = OPTIONS._replace(**options)
    draws = uniforms(DRAWS, 7, np.arange(count))
    return np.array(
        list(
            tf.data.Dataset.from_tensor_slices(draws)
            .map(lambda d: draw_box(tf.constant([height, width]), options, d))
            .as_numpy_iterator()
        )
    )


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (97, 131)])
def test_the_random_resized_crop_has_the_areas_and_ratios_asked_for(height, width):
    top, left, high, wide = boxes(height, width, resized_crop=(0.3, 0.8)).T
    assert np.all(top >= 0)
    assert np.all(left >= 0)
    assert np.all(top + high <= height)
    assert np.all(left + wide <= width)
    areas = high * wide / (height * width)
    assert areas.min() > 0.29
    assert areas.max() < 0.82
    ratios = wide / high
    assert ratios.min() > 0.73
    assert ratios.max() < 1.36
    assert np.ptp(ratios) > 0.4
    assert len(np.unique(top)) > 20


def test_where_no_attempt_fits_the_middle_is_taken_as_torchvision_does():
    (box,) = np.unique(boxes(20, 400, 20, resized_crop=(0.99, 1.0)), axis=0)
    assert box.tolist() == [0, 187, 20, 27]  # the ratio is bounded by 4 / 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decoding_a_box_gives_that_part_of_the_picture(kind):
    pixels = photograph(80, 120)
    file = tf.constant(encode(pixels, kind, **({"quality": 95} if kind == "JPEG" else {})))
    whole = images.decode(file).numpy()
    part = images.decode_box(file, tf.constant([11, 23, 40, 50])).numpy()
    assert part.shape == (40, 50, 3)
    # At its edges libjpeg interpolates colour without the neighbours outside.
    inner, expected = part[2:-2, 2:-2], whole[13:49, 25:71]
    np.testing.assert_array_equal(inner, expected)


def recolored(pixels, draw=0.3, **options):
    draws = tf.fill([DRAWS], draw)
    return recolor(tf.constant(pixels), OPTIONS._replace(**options), draws).numpy()


def test_without_strength_colours_stay():
    pixels = photograph(9, 9)
    np.testing.assert_array_equal(recolored(pixels, color_jitter=(0, 0, 0, 0)), pixels)
    np.testing.assert_array_equal(recolored(pixels, 0.9, color_jitter=(1, 1, 1, 0.5)), pixels)
    jittered = recolored(pixels, 0.5, color_jitter=(0.4, 0.4, 0.4, 0.1))  # factors of one
    assert difference(jittered, pixels)[0] <= 1


@pytest.mark.parametrize(("place", "name"), [(0, "Brightness"), (1, "Contrast"), (2, "Color")])
def test_brightness_contrast_and_saturation_are_pillows(place, name):
    pixels = photograph(40, 50)
    strengths = tuple(0.8 * (i == place) for i in range(4))
    enhance = getattr(ImageEnhance, name)(Image.fromarray(pixels))
    expected = np.asarray(enhance.enhance(0.2 + 0.3 * 1.6))
    assert difference(recolored(pixels, color_jitter=strengths), expected)[0] <= 2


def test_grey_is_pillows():
    pixels = photograph(40, 50)
    expected = np.asarray(Image.fromarray(pixels).convert("L"))
    result = recolored(pixels, 0.1, gray_prob=0.2)
    assert difference(result, np.repeat(expected[..., None], 3, -1))[0] <= 1
    np.testing.assert_array_equal(recolored(pixels, 0.3, gray_prob=0.2), pixels)


def test_header_sizes_are_those_of_the_pixels():
    for name, file in FILES.items():
        assert images.read_size(tf.constant(file)).numpy().tolist() == [30, 41], name


@pytest.mark.parametrize(
    ("height", "width", "kind", "scale"),
    [
        (120, 150, "JPEG", 1),
        (120, 150, "PNG", 1),
        (300, 410, "JPEG", 4),
        (511, 290, "JPEG", 4),
        (2_000, 1_900, "JPEG", None),  # more than eight canvases
        (300, 410, "PNG", None),
    ],
)
def test_a_canvas_resized_on_the_device_is_what_the_host_makes_of_the_picture(
    height, width, kind, scale
):
    target = 16
    assert images.canvas_size(target) == 96
    pixels = photograph(height, width)
    encoded = tf.constant(encode(pixels, kind))
    if kind == "JPEG" and scale == 1:
        assert height > 96  # so that the box alone has to fit
    side = {1: 90, 4: 283, None: 283 if kind == "PNG" else 1_800}[scale]
    box = tf.constant([7, 5, side, side])
    size = tf.constant([height, width])
    canvas, place = images.decode_canvas(encoded, size, box, target)
    assert max(canvas.shape[:2]) <= 96
    rest = [(0, 96 - side) for side in canvas.shape[:2]]
    image = np.pad(canvas, [*rest, (0, 0)])
    result = np.asarray(crop_resize(image[None], place.numpy()[None], target))[0]
    expected = images.resize(images.decode_box(encoded, box), target).numpy()
    largest, mean = difference(result, expected)
    if scale == 4:
        np.testing.assert_allclose(place, [7 / 4 - 1, 5 / 4 - 1, side / 4, side / 4])
        assert mean < 1
    else:
        assert largest <= 1
        assert mean < 0.02
