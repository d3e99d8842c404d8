"""Looks through a source, decoding everything: what it holds, what is bad, how fast it reads.

    python -m clip_jax.data.inspect SOURCE [--json=OUT] [--sheet=contact_sheet.png]

SOURCE is one spec of config.data.train. Bad records are counted by kind, and named in the log; the
contact sheet shows pictures from all over the source with their captions.
"""

import json
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from etils import epath
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from clip_jax.data import augment, command, images
from clip_jax.data.faults import REPAIRED, Faults
from clip_jax.data.pipeline import usable_cores
from clip_jax.data.rows import LONGEST_CAPTION, caption_text
from clip_jax.data.scan import scan
from clip_jax.data.source import Features, Source
from clip_jax.data.sources import open_source

_SHEET = 24  # pictures
_COLUMNS = 6
_THUMBNAIL = 192  # pixels


class Picture(NamedTuple):
    """One for the contact sheet."""

    number: int  # among the good ones
    encoded: bytes
    caption: str


def inspect(source: Source, max_pixels: int) -> tuple[dict[str, Any], list[Picture]]:
    """Reads and decodes all of a source.

    Returns:
        The report: `samples`, good ones; `bad`, those left out, by kind; `repaired`, by kind, which
        are among the samples; `shards`, `seconds`, `samples_per_second`, and medians of the
        pictures. And pictures for a contact sheet.
    """
    start = time.perf_counter()
    faults = Faults(max_bad=1.0)
    sizes: list[Any] = []
    picture_bytes = 0
    sheet: list[Picture] = []

    @tf.function(autograph=False)
    def row(fields: Features) -> Features:
        return _decoded(source.parse(fields), source.has_captions, max_pixels)

    records = scan(source, range(len(source.shards)), row, max_pixels, usable_cores())
    total = sum(source.counts) if source.counts else None
    for shard, key, values, fault in tqdm(records, total=total, unit="sample"):
        if fault is not None:
            faults.report(shard, key, fault)
            continue
        caption, repair = caption_text(values["caption"])
        if source.label_names is not None and not source.has_captions:
            caption = dict(enumerate(source.label_names)).get(int(caption), caption)
        if repair is not None:
            faults.report(shard, key, repair)
        # Thinned out whenever it is full: every 2^k-th picture stays.
        stride = 1 << (len(sizes) // _SHEET).bit_length()
        if len(sizes) % stride == 0:
            sheet = [picture for picture in sheet if picture.number % stride == 0]
            sheet.append(Picture(len(sizes), values["image"], caption))
        sizes.append(values["size"])
        picture_bytes += len(values["image"])
    seconds = time.perf_counter() - start
    counts = faults.counts()
    report: dict[str, Any] = {
        "source": source.spec,
        "samples": len(sizes),
        "bad": {kind: n for kind, n in counts.items() if kind not in REPAIRED},
        "repaired": {kind: n for kind, n in counts.items() if kind in REPAIRED},
        "shards": len(source.shards),
        "seconds": round(seconds, 3),
        "samples_per_second": round(len(sizes) / seconds, 1),
    }
    if sizes:
        height, width = np.median(np.array(sizes), 0).tolist()
        mean = round(picture_bytes / len(sizes))
        report |= {"median_height": height, "median_width": width, "mean_bytes": mean}
    if source.label_names is not None:
        report["labels"] = len(source.label_names)
    return report, sheet


def _decoded(features: Features, has_captions: bool, max_pixels: int) -> Features:
    image = features["image"]
    size = images.within(images.read_size(image), max_pixels)
    pixels = images.decode_box(image, tf.concat([[0, 0], size], 0))
    caption = tf.constant("")
    if has_captions:
        caption = augment.choose_caption(
            features["captions"], features["weights"], tf.zeros([augment.DRAWS])
        )
    elif "label" in features:
        caption = tf.strings.as_string(features["label"])
    return {
        "size": tf.shape(pixels)[:2],
        "caption": tf.strings.substr(caption, 0, LONGEST_CAPTION + 1),
        "image": image,
    }


def draw_sheet(pictures: Iterable[Picture], path: epath.PathLike) -> None:
    """A PNG of pictures in rows of six, each with its caption below."""
    pictures = list(pictures)
    height = _THUMBNAIL + 54
    rows = max(-(-len(pictures) // _COLUMNS), 1)
    sheet = Image.new("RGB", (_COLUMNS * _THUMBNAIL, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 11)
    for place, picture in enumerate(pictures):
        x, y = place % _COLUMNS * _THUMBNAIL, place // _COLUMNS * height
        pixels = Image.fromarray(images.decode(tf.constant(picture.encoded)).numpy())
        pixels.thumbnail((_THUMBNAIL - 6, _THUMBNAIL - 6))
        sheet.paste(pixels, (x + 3, y + 3))
        lines = textwrap.wrap(picture.caption, 29, max_lines=3, placeholder=" ...")
        pen.text((x + 4, y + _THUMBNAIL), "\n".join(lines), "black", font)
    with epath.Path(path).open("wb") as file:
        sheet.save(file, "PNG")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; by default of the process's own arguments."""
    parser = command.parser("clip_jax.data.inspect", __doc__)
    parser.add_argument("--json", metavar="OUT", help="where to write the report; it is printed")
    parser.add_argument(
        "--sheet", default="contact_sheet.png", help="the contact sheet; empty for none"
    )
    given = parser.parse_args(arguments)
    config = command.data_config(given)
    report, pictures = inspect(open_source(given.source, config), config.max_pixels)
    text = json.dumps(report, indent=2)
    print(text)
    if given.json:
        epath.Path(given.json).write_text(text + "\n")
    if given.sheet:
        draw_sheet(pictures, given.sheet)
        print(f"{len(pictures)} pictures in {given.sheet}", file=sys.stderr)


if __name__ == "__main__":
    command.run(main)
