"""Pixels as the image tower sees them: one definition for training, evaluation and `load`.

Images are brought to size as uint8 and normalised afterwards: on the host, `Preprocess` returns
normalised float32; the data pipeline ships uint8 and the jitted step calls `normalize`.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

ResizeMode = Literal["shortest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """The evaluation transform of a model; the defaults are OpenAI's.

    Attributes:
        size: of the square, in pixels.
        mean: of the pixels in [0, 1], by channel; they are subtracted.
        std: likewise; divided by.
        resize_mode: "shortest" brings the short side to `size` and cuts out the centre (OpenAI's),
            "squash" brings both sides to `size` (SigLIP's).
        interpolation: antialiased, as Pillow does it.
    """

    size: int
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    resize_mode: ResizeMode = "shortest"
    interpolation: Interpolation = "bicubic"

    def resize(self, image: Image.Image) -> UInt8[np.ndarray, "size size 3"]:
        """A PIL picture of any size and mode -> square RGB pixels.

        As the released code does, EXIF rotation is not applied, and the picture becomes RGB after
        it is resized: a palette is resized as such, and 16 bits are clipped to 8.
        """
        if self.resize_mode == "squash":
            image = image.resize((self.size, self.size), _FILTERS[self.interpolation])
            return np.asarray(image.convert("RGB"))
        short = min(image.size)
        width, height = (int(self.size * side / short) for side in image.size)
        image = image.resize((width, height), _FILTERS[self.interpolation])
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image.convert("RGB"))

    def normalize(self, pixels: UInt8[Array | np.ndarray, "*batch C"]) -> Float[Array, "*batch C"]:
        """Pixels 0 to 255 -> normalised float32, in JAX; for use inside a jitted function."""
        scaled = jnp.asarray(pixels, jnp.float32) / 255
        return (scaled - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    def __call__(self, image: Image.Image) -> Float[np.ndarray, "size size 3"]:
        """A PIL picture -> normalised float32 [size, size, 3]; stack them for a batch."""
        scaled = self.resize(image).astype(np.float32) / 255
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the model card."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocess":
        """The inverse of `to_dict`; fields that an older card lacks take their defaults."""
        tuples = {"mean": tuple(values["mean"]), "std": tuple(values["std"])}
        return cls(**values | tuples)
