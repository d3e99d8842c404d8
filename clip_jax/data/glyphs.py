"""An image-text data set that needs no download: the glyphs matplotlib ships and their names.

matplotlib bundles the DejaVu and STIX fonts: 16 faces that draw some 7,300 characters. A glyph is
an image, the Unicode standard holds an official description of it, and the two make about 54,000
pairs such as (picture of an e with an accent, "bold oblique sans latin small letter e with acute").
Ten per cent of the *characters* are held out, in all faces: their images and their names are new
to a model trained on the rest, the words of the names are not. That makes a true zero-shot test.

>>> builder = prepare("/tmp/data")                  # about 15 s, once
>>> builder.as_dataset(split="train")
>>> held_out(builder.info.features["label"].names)  # classes of "test"
"""

import contextlib
import hashlib
import io
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

FACES: dict[str, str] = {
    "sans": "DejaVuSans.ttf",
    "bold sans": "DejaVuSans-Bold.ttf",
    "oblique sans": "DejaVuSans-Oblique.ttf",
    "bold oblique sans": "DejaVuSans-BoldOblique.ttf",
    "sans mono": "DejaVuSansMono.ttf",
    "bold sans mono": "DejaVuSansMono-Bold.ttf",
    "oblique sans mono": "DejaVuSansMono-Oblique.ttf",
    "bold oblique sans mono": "DejaVuSansMono-BoldOblique.ttf",
    "serif": "DejaVuSerif.ttf",
    "bold serif": "DejaVuSerif-Bold.ttf",
    "italic serif": "DejaVuSerif-Italic.ttf",
    "bold italic serif": "DejaVuSerif-BoldItalic.ttf",
    "stix": "STIXGeneral.ttf",
    "bold stix": "STIXGeneralBol.ttf",
    "italic stix": "STIXGeneralItalic.ttf",
    "bold italic stix": "STIXGeneralBolIta.ttf",
}
"""The words that name a face in captions and prompts -> the file that matplotlib holds."""

# 48 pixels keep diacritics apart and divide into patches of 8, 12 and 16. One em is 36 pixels in
# every face, so that relative size (small and capital, superscript) is kept; a glyph whose ink
# would exceed 42 pixels, which leaves 3 of paper on each side, is drawn smaller. That happens to
# 4.5 % of the glyphs: long arrows, ligatures, box drawings.
SIZE = 48
EM = 36
INK = 42
HELD_OUT_PER_CENT = 10
NUM_SHARDS = 16  # of either split; TFDS would write one, and streams and hosts share out shards

_DESCRIPTION = __doc__
_LICENSE = """Glyph outlines: DejaVu fonts 2.37 (Bitstream Vera and Arev licences, changes in the \
public domain), STIX fonts 1.1 (SIL Open Font License 1.1). Character names: Unicode licence V3."""
_CITATION = """\
@misc{dejavu, title={DejaVu Fonts 2.37}, howpublished={https://dejavu-fonts.github.io}, year={2016}}
@misc{stix, title={STIX Fonts}, howpublished={https://www.stixfonts.org}, year={2010}}
@misc{unicode, title={Unicode Character Database}, howpublished={https://www.unicode.org/ucd/}}"""


def is_held_out(char: str) -> bool:
    """Whether `char` (one character) belongs to the test split: a hash of its code point alone.

    Does not depend on the fonts, on library versions or on PYTHONHASHSEED.
    """
    digest = hashlib.sha256(f"U+{ord(char):04X}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PER_CENT


def held_out(names: Sequence[str]) -> np.ndarray:
    """The labels of the classes that no training example shows.

    Args:
      names: the names of the `label` feature, lower-cased Unicode names in the order of the labels.

    Returns:
      int64 [number of held-out classes], increasing.
    """
    chars = (unicodedata.lookup(name.upper()) for name in names)
    return np.flatnonzero([is_held_out(char) for char in chars])


def render(face: str) -> Iterator[tuple[str, np.ndarray]]:
    """Draws one face.

    Args:
      face: a key of `FACES`.

    Yields:
      (character, uint8 [48, 48]) in the order of code points: black ink (0) on white paper (255),
      its bounding box centred. Left out: characters without an official name (controls, private
      use), characters the face does not map, and glyphs without ink.

    Raises:
      KeyError: if the face is unknown.
      FileNotFoundError: if this matplotlib does not bundle the font.
    """
    import matplotlib
    from matplotlib.ft2font import FT2Font, LoadFlags

    font = FT2Font(str(Path(matplotlib.get_data_path(), "fonts", "ttf", FACES[face])))
    for code in sorted(font.get_charmap()):
        if not unicodedata.name(chr(code), ""):
            continue
        # An outline grows linearly with its size, up to the rounding to whole pixels at its edges:
        # hence a second and seldom a third round.
        em = float(EM)
        while True:
            font.set_size(em, 72)  # at 72 dots per inch a point is a pixel
            glyph = font.load_char(code, flags=LoadFlags.NO_HINTING)
            left, bottom, right, top = glyph.bbox  # in 1/64 pixel, y upwards
            x0, x1, y0, y1 = left // 64, -(-right // 64), bottom // 64, -(-top // 64)
            width, height = x1 - x0, y1 - y0
            if max(width, height) <= INK:
                break
            em *= min((INK - 0.5) / max(width, height), 0.99)
        ink = np.zeros((SIZE, SIZE), np.uint8)
        if left < right and bottom < top:
            # ft2font adds the bearing x0 itself, but puts the top row of the bitmap at y.
            font.draw_glyph_to_bitmap(ink, (SIZE - width) // 2 - x0, (SIZE - height) // 2, glyph)
        if ink.any():
            yield chr(code), 255 - ink


def _png(image: np.ndarray) -> bytes:
    """Encodes uint8 [H, W] as a grey PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


class Glyphs(tfds.core.GeneratorBasedBuilder):
    """Glyphs and their names as a TFDS data set; use `prepare` to make it.

    Features of an example, in the splits `train` and `test`:
      image: uint8 [48, 48, 1], black on white.
      caption: str, face and name: "italic serif greek small letter alpha".
      face: str, a key of `FACES`.
      label: int64, the index of the character's name among the names of all characters, ordered by
        code point. A name is in one split only, the labels count through both.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Without this TFDS looks for the file through importlib_resources, which it does not install.
    code_path = tfds.core.Path(__file__)
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 1), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "face": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(),  # the names come with the glyphs
                }
            ),
            homepage="https://dejavu-fonts.github.io",
            citation=_CITATION,
            license=_LICENSE,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        glyphs = [(face, char, _png(image)) for face in FACES for char, image in render(face)]
        chars = sorted({char for _, char, _ in glyphs})
        self.info.features["label"].names = [unicodedata.name(char).lower() for char in chars]
        labels = {char: label for label, char in enumerate(chars)}
        test = [glyph for glyph in glyphs if is_held_out(glyph[1])]
        train = [glyph for glyph in glyphs if not is_held_out(glyph[1])]
        return {
            "train": self._generate_examples(train, labels),
            "test": self._generate_examples(test, labels),
        }

    def _generate_examples(self, glyphs, labels):
        for face, char, png in glyphs:
            example = {
                "image": io.BytesIO(png),
                "caption": f"{face} {unicodedata.name(char).lower()}",
                "face": face,
                "label": labels[char],
            }
            yield f"U+{ord(char):04X} {face}", example


def prepare(data_dir: str | os.PathLike[str]) -> Glyphs:
    """Makes the data set under `data_dir`, unless it is there already, and opens it.

    The files appear under their final name only when complete. Of several processes that start at
    once the first to finish wins and the others use its files, which hold the same records.

    Args:
      data_dir: where TFDS keeps data sets; this one goes to `data_dir/glyphs/1.0.0`.

    Returns:
      The builder, ready for `as_dataset` and `as_data_source`.

    Raises:
      OSError: if `data_dir` cannot be written.
    """
    config = tfds.download.DownloadConfig(num_shards=NUM_SHARDS, try_download_gcs=False)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder = Glyphs(data_dir=os.fspath(data_dir))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # "Downloading ...": it does not
            builder.download_and_prepare(download_config=config)
    except OSError:  # another process was first: TFDS found its directory where its own had to go
        if not builder.data_path.exists():
            raise
    return Glyphs(data_dir=os.fspath(data_dir))  # as the files have it, whoever wrote them
