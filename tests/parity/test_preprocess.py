"""Pixels against OpenAI's transform as its repository has it, built of torchvision's parts.

Real photographs and made-up ones, odd sizes, every mode, EXIF rotation: through `load`'s preprocess
and through the decoding of evaluation.
"""

import io
import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from clip_jax.eval.embed import decode
from clip_jax.preprocess import MEAN, STD, Preprocess
from clip_jax.weights.transformers import default_preprocess, write_preprocess
from tests.data.records import photograph

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transforms = pytest.importorskip(
    "torchvision.transforms", reason="needs torchvision: pip install -e '.[parity]'"
)
open_clip = pytest.importorskip("open_clip", reason="needs open_clip: pip install -e '.[parity]'")

SAMPLES = Path(matplotlib.get_data_path(), "sample_data")
PHOTOGRAPHS = ["grace_hopper.jpg", "Minduka_Present_Blue_Pack.png", "logo2.png"]
SIZES = [(640, 427), (427, 640), (224, 224), (225, 223), (101, 37), (33, 500)]
MODES = ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "I;16"]


def openais(size):
    """The transform of the released code."""
    return transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            lambda image: image.convert("RGB"),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def picture(width, height, mode):
    pixels = photograph(height, width)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    image = Image.fromarray(pixels)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(pixels[::-1, :, 0].copy()))
    return image.convert(mode)


def difference(found, expected):
    return np.abs(found - expected.numpy().transpose(1, 2, 0)).max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_every_mode_and_size_is_openais(mode, size):
    image = picture(*size, mode)
    for target in (224, 96):
        # Measured: 0, in every one of them.
        assert difference(Preprocess(target)(image), openais(target)(image)) == 0


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("size", [224, 336])
def test_photographs_are_openais_and_evaluations(name, size):
    path = SAMPLES / name
    with Image.open(path) as image:
        expected = openais(size)(image)
        assert difference(Preprocess(size)(image), expected) == 0
    preprocess = Preprocess(size)
    pixels = decode(path.read_bytes(), preprocess)
    with Image.open(path) as image:
        np.testing.assert_array_equal(pixels, preprocess.resize(image))
    assert difference(np.asarray(preprocess.normalize(pixels)), expected) < 1e-6


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_evaluation_of_every_mode_is_openais(mode):
    file = io.BytesIO()
    picture(301, 200, mode).save(file, "PNG")
    preprocess = Preprocess(96)
    pixels = decode(file.getvalue(), preprocess)
    expected = openais(96)(Image.open(io.BytesIO(file.getvalue())))
    assert difference(np.asarray(preprocess.normalize(pixels)), expected) < 1e-6


def test_cmyk_and_rotated_jpegs():
    for mode, options in (("CMYK", {}), ("RGB", {"exif": rotated()})):
        file = io.BytesIO()
        picture(301, 200, mode).save(file, "JPEG", quality=95, **options)
        image = Image.open(io.BytesIO(file.getvalue()))
        assert image.size == (301, 200)  # the rotation is in the tag
        expected = openais(96)(image)
        assert difference(Preprocess(96)(image), expected) == 0
        pixels = decode(file.getvalue(), Preprocess(96))
        assert difference(np.asarray(Preprocess(96).normalize(pixels)), expected) < 1e-6


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    return exif


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_other_modes_are_open_clips(mode, interpolation):
    half = (0.5, 0.5, 0.5)
    preprocess = Preprocess(96, half, half, mode, interpolation)
    theirs = open_clip.transform.image_transform(
        96, is_train=False, mean=half, std=half, resize_mode=mode, interpolation=interpolation
    )
    for size in SIZES:
        for kind in ("RGB", "L", "RGBA"):
            image = picture(*size, kind)
            assert difference(preprocess(image), theirs(image)) == 0


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_processors_read_what_convert_writes(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[parity]'")
    preprocess = default_preprocess(96, kind)
    values = write_preprocess(preprocess, kind)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for size in SIZES[2:]:  # of an odd margin, Transformers cuts out another centre by a pixel
        image = picture(*size, "RGB")
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        assert difference(preprocess(image), theirs) < 1e-5
