import json

import numpy as np
import pytest
from PIL import Image

from clip_jax.preprocess import MEAN, STD, Preprocess


def picture(width, height, mode="RGB"):
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / 7 + k) + np.cos(columns / (5 + k)) for k in range(3)]
    pixels = np.uint8(np.clip(np.stack(waves, -1) * 60 + 128, 0, 255))
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (224, 224), (100, 90), (1000, 60)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_any_picture_becomes_a_normalised_square(size, mode):
    pixels = Preprocess(224)(picture(*size, mode))
    assert pixels.shape == (224, 224, 3)
    assert pixels.dtype == np.float32
    lowest, highest = (0 - np.array(MEAN)) / STD, (1 - np.array(MEAN)) / STD
    assert np.all(pixels >= lowest - 1e-5)
    assert np.all(pixels <= highest + 1e-5)


def test_the_centre_is_kept_and_the_short_side_resized():
    # A horizontal ramp twice as wide as high: the middle half remains.
    ramp = np.broadcast_to(np.linspace(0, 255, 400)[None, :, None], (200, 400, 3))
    resized = Preprocess(100).resize(Image.fromarray(ramp.astype(np.uint8)))
    np.testing.assert_allclose(resized[:, 0], 255 * 0.25, atol=2)
    np.testing.assert_allclose(resized[:, -1], 255 * 0.75, atol=2)


def test_host_and_device_normalise_alike():
    preprocess = Preprocess(32)
    image = picture(50, 40)
    np.testing.assert_allclose(
        preprocess.normalize(preprocess.resize(image)), preprocess(image), atol=1e-6
    )


def test_the_plain_form_keeps_everything():
    preprocess = Preprocess(
        40,
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.6, 0.7),
        resize_mode="squash",
        interpolation="bilinear",
    )
    plain = json.loads(json.dumps(preprocess.to_dict()))
    assert Preprocess.from_dict(plain) == preprocess


def test_cards_of_before_the_resize_modes_mean_the_released_transform():
    old = {"size": 40, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    expected = Preprocess(40, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "shortest", "bicubic")
    assert Preprocess.from_dict(old) == expected


def test_squashing_keeps_all_of_the_picture():
    ramp = np.broadcast_to(np.linspace(0, 255, 400)[None, :, None], (200, 400, 3))
    image = Image.fromarray(ramp.astype(np.uint8))
    squashed = Preprocess(100, resize_mode="squash").resize(image)
    np.testing.assert_allclose(squashed[:, 0], 0, atol=2)
    np.testing.assert_allclose(squashed[:, -1], 255, atol=2)
    bilinear = Preprocess(100, resize_mode="squash", interpolation="bilinear").resize(image)
    expected = np.asarray(image.resize((100, 100), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(bilinear, expected)
