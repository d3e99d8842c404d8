"""Pixels as the image tower sees them: one definition for training, evaluation and `load`.

Images are brought to size as uint8 and normalised afterwards: on the host, `Preprocess` returns
normalised float32; the data pipeline ships uint8 and the jitted step calls `normalize`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """OpenAI's evaluation transform.

    Short side to `size` by antialiased bicubic interpolation, centre crop, RGB, [0, 1],
    normalised by `mean` and `std`.
    """

    size: int
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def resize(self, image: Image.Image) -> UInt8[np.ndarray, "size size 3"]:
        """A PIL picture of any size and mode -> square RGB pixels.

        As the released code does, EXIF rotation is not applied and a palette is resized as such.
        """
        short = min(image.size)
        width, height = (int(self.size * side / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
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
        """The inverse of `to_dict`."""
        return cls(size=values["size"], mean=tuple(values["mean"]), std=tuple(values["std"]))
