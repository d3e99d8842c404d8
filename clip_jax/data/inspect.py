"""Looks through a source, decoding everything: what it holds, what is bad, how fast it reads.

    python -m clip_jax.data.inspect SOURCE [--json=OUT] [--sheet=sheet.png]

SOURCE is what config.data.train takes. Bad records are counted by kind and listed in the log; the
contact sheet shows pictures from all over the source with their captions.
"""

import collections
import json
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from absl import app, flags
from etils import epath
from PIL import Image, ImageDraw
from tqdm import tqdm

from clip_jax.config import default_config
from clip_jax.data import augment, images
from clip_jax.data.faults import (
    INVALID_UTF8,
    LONG_CAPTION,
    MISSING_CAPTION,
    REPAIRED,
    UNREADABLE_SHARD,
    Fault,
    Faults,
)
from clip_jax.data.rows import LONGEST_CAPTION, columns_of, examine, reason, signature
from clip_jax.data.source import Record, Source
from clip_jax.data.sources import open_source
from clip_jax.errors import UserError

_GROUP = 64  # records handed to TensorFlow at once
_SHEET = 24  # pictures
_THUMBNAIL = 192

_JSON = flags.DEFINE_string("json", None, "Where to write the report; default: only printed.")
_SHEET_PATH = flags.DEFINE_string("sheet", None, "Where to draw the contact sheet, a PNG.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Of TFDS; default: TFDS's own.")
_IMAGE = flags.DEFINE_string("image_field", None, "As config.data.image_field.")
_CAPTIONS = flags.DEFINE_list("captions", None, "As config.data.captions, separated by commas.")


class _Pass:
    """All records of a source, once, and what is wrong with those that do not come through."""

    def __init__(self, source: Source, max_pixels: int):
        self.faults = Faults(max_bad=1.0)
        self.sheet: list[tuple[int, bytes, str]] = []
        self.sizes: list[tuple[int, int]] = []
        self.picture_bytes = 0
        self._source = source
        self._max_pixels = max_pixels
        self._underway: collections.OrderedDict[int, tuple[str, Record]] = collections.OrderedDict()

    def run(self, progress: tqdm) -> None:
        """Reads, decodes and counts."""
        fields = dict(self._source.fields) | {"ticket": tf.TensorSpec([], tf.int64)}
        rows = (
            tf.data.Dataset.from_generator(self._columns, output_signature=signature(fields))
            .unbatch()
            .map(tf.function(self._row, autograph=False), tf.data.AUTOTUNE, deterministic=True)
            .ignore_errors()
        )
        for row in rows.as_numpy_iterator():
            self._examine_until(int(row["ticket"]))
            path, record = self._underway.pop(int(row["ticket"]))
            self._note(path, record.key, row)
            progress.update()
        self._examine_until(None)

    def _columns(self) -> Iterator[dict[str, np.ndarray]]:
        group: list[Record] = []
        ticket = 0
        for path, record in self._records():
            self._underway[ticket + len(group)] = path, record
            group.append(record)
            if len(group) == _GROUP:
                yield self._column(group, ticket)
                ticket, group = ticket + len(group), []
        if group:
            yield self._column(group, ticket)

    def _column(self, group: list[Record], ticket: int) -> dict[str, np.ndarray]:
        columns = columns_of(self._source.fields, [record.fields for record in group])
        return columns | {"ticket": ticket + np.arange(len(group))}

    def _records(self) -> Iterator[tuple[str, Record]]:
        for number, path in enumerate(self._source.shards):
            try:
                for record in self._source.read(number, 0, 0):
                    if record.fault is None:
                        yield str(path), record
                    else:
                        self.faults.report(str(path), record.key, record.fault)
            except tf.errors.OpError as error:
                self.faults.report(str(path), "", Fault(UNREADABLE_SHARD, reason(error)))

    def _row(self, fields: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        features = self._source.parse({name: fields[name] for name in self._source.fields})
        size = images.within(images.read_size(features["image"]), self._max_pixels)
        pixels = images.decode_box(features["image"], tf.concat([[0, 0], size], 0))
        caption = tf.constant("")
        if self._source.has_captions:
            caption = augment.choose_caption(
                features["captions"], features["weights"], tf.zeros([augment.DRAWS])
            )
        elif "label" in features:
            caption = tf.strings.as_string(features["label"])
        return {
            "ticket": fields["ticket"],
            "size": tf.shape(pixels)[:2],
            "bytes": tf.strings.length(features["image"]),
            "caption": tf.strings.substr(caption, 0, LONGEST_CAPTION + 1),
            "image": features["image"],
        }

    def _note(self, path: str, key: str, row: dict[str, Any]) -> None:
        caption = row["caption"]
        if len(caption) > LONGEST_CAPTION:
            self.faults.report(path, key, Fault(LONG_CAPTION, "it will be cut"))
        try:
            text = caption.decode()
        except UnicodeDecodeError as error:
            self.faults.report(path, key, Fault(INVALID_UTF8, str(error)))
            text = caption.decode(errors="replace")
        number = len(self.sizes)
        self.sizes.append(tuple(map(int, row["size"])))
        self.picture_bytes += int(row["bytes"])
        # Thinned out whenever it is full: every 2^k-th picture stays.
        stride = 1 << max(0, (number // _SHEET).bit_length())
        if number % stride == 0:
            self.sheet = [each for each in self.sheet if each[0] % stride == 0]
            self.sheet.append((number, row["image"], text))

    def _examine_until(self, ticket: int | None) -> None:
        while self._underway and (ticket is None or next(iter(self._underway)) < ticket):
            _, (path, record) = self._underway.popitem(last=False)
            fault = examine(self._source, record.fields, self._max_pixels)
            self.faults.report(path, record.key, fault or Fault(MISSING_CAPTION, "no words"))


def inspect(source: Source, max_pixels: int) -> tuple[dict[str, Any], list[tuple[int, bytes, str]]]:
    """Reads and decodes all of a source.

    Returns:
        The report: `samples`, good ones; `bad`, those left out, by kind; `repaired`, by kind, which
        are among the samples; `shards`, `seconds`, `samples_per_second`, and medians of the
        pictures. And pictures for a contact sheet: number, encoded, caption.
    """
    start = time.perf_counter()
    look = _Pass(source, max_pixels)
    with tqdm(unit="sample", total=sum(source.counts) if source.counts else None) as progress:
        look.run(progress)
    seconds = time.perf_counter() - start
    counts = look.faults.counts()
    samples = len(look.sizes)
    report: dict[str, Any] = {
        "source": source.spec,
        "samples": samples,
        "bad": {kind: n for kind, n in counts.items() if kind not in REPAIRED},
        "repaired": {kind: n for kind, n in counts.items() if kind in REPAIRED},
        "shards": len(source.shards),
        "seconds": round(seconds, 3),
        "samples_per_second": round(samples / seconds, 1),
    }
    if samples:
        heights, widths = np.array(look.sizes).T
        report |= {
            "median_height": int(np.median(heights)),
            "median_width": int(np.median(widths)),
            "mean_bytes": look.picture_bytes // samples,
        }
    if source.label_names is not None:
        report["labels"] = len(source.label_names)
    return report, look.sheet


def draw_sheet(pictures: list[tuple[int, bytes, str]], path: epath.PathLike) -> None:
    """A PNG of pictures in rows of six, each with its caption below."""
    columns, height = 6, _THUMBNAIL + 54
    rows = max(-(-len(pictures) // columns), 1)
    sheet = Image.new("RGB", (columns * _THUMBNAIL, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (_, picture, caption) in enumerate(pictures):
        x, y = place % columns * _THUMBNAIL, place // columns * height
        pixels = Image.fromarray(images.decode(tf.constant(picture)).numpy())
        pixels.thumbnail((_THUMBNAIL - 6, _THUMBNAIL - 6))
        sheet.paste(pixels, (x + 3, y + 3))
        lines = textwrap.wrap(caption, 30, max_lines=3, placeholder=" ...")
        text = "\n".join(lines).encode("latin-1", "replace").decode("latin-1")
        pen.text((x + 4, y + _THUMBNAIL), text, fill="black")
    with epath.Path(path).open("wb") as file:
        sheet.save(file, "PNG")


def main(argv: list[str]) -> None:
    """The command."""
    if len(argv) != 2:
        raise app.UsageError("expected one SOURCE")
    config = default_config().data
    config.update(data_dir=_DATA_DIR.value, image_field=_IMAGE.value, captions=_CAPTIONS.value)
    try:
        source = open_source(argv[1], config)
    except UserError as error:
        sys.exit(f"inspect: {error}")
    report, pictures = inspect(source, config.max_pixels)
    print(json.dumps(report, indent=2))
    if _JSON.value:
        epath.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")
    if _SHEET_PATH.value:
        draw_sheet(pictures, _SHEET_PATH.value)


if __name__ == "__main__":
    app.run(main)
