"""Small TFRecord shards, the pictures in them, and a TFDS data set of ten pairs."""

import io
import tarfile
from typing import ClassVar

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image


def photograph(height, width, seed=0):
    """Waves of many lengths, hard edges and noise: uint8 [height, width, 3]."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    pixels = np.zeros((height, width, 3))
    for _ in range(10):
        frequency = 2 ** random.uniform(0, 6) / max(height, width)
        angle, phases = random.uniform(0, 2 * np.pi), random.uniform(0, 2 * np.pi, 3)
        distance = np.cos(angle) * columns + np.sin(angle) * rows
        wave = np.sin(2 * np.pi * frequency * distance[..., None] + phases)
        pixels += wave / (1 + 20 * frequency)
    pixels = 15 + 220 * (pixels - pixels.min()) / max(np.ptp(pixels), 1e-6)
    pixels[height // 4 : height // 2, width // 3 : width // 2] = 255
    pixels[height // 2 :, : width // 5] = 0
    return np.uint8(np.clip(pixels + random.normal(0, 6, pixels.shape), 0, 255))


def coordinates(height, width):
    """A picture whose pixel (i, j) is the colour (i, j, 0): uint8 [height, width, 3]."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], -1).astype(np.uint8)


def encode(pixels, kind="PNG", mode="RGB", **options):
    """Uint8 [H, W, 3] -> the bytes of a picture file."""
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def example(**features):
    """Bytes by name -> a serialized tf.train.Example."""
    return tf.train.Example(
        features=tf.train.Features(
            feature={
                name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
                for name, value in features.items()
            }
        )
    ).SerializeToString()


def write_shard(path, records):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)


def pair(number):
    """Pair `number`: a PNG whose size, shape and pixels depend on it, and its caption."""
    pixels = photograph(20 + number % 7, 20 + number % 11, seed=number)
    return encode(pixels), f"photograph number {number}".encode()


def write_pairs(directory, lengths, changes=None):
    """Shards such as img2dataset writes, of so many pairs each; returns the brace pattern.

    `changes` maps the number of a pair to the features that it has instead of its own.
    """
    directory.mkdir(exist_ok=True)
    number = 0
    for shard, length in enumerate(lengths):
        records = []
        for _ in range(length):
            picture, caption = pair(number)
            features = {"key": b"%09d" % number, "jpg": picture, "txt": caption}
            records.append(example(**(features | (changes or {}).get(number, {}))))
            number += 1
        write_shard(directory / f"{shard:05d}.tfrecord", records)
    return f"{directory}/{{00000..{len(lengths) - 1:05d}}}.tfrecord"


class TinyPairs(tfds.core.GeneratorBasedBuilder):
    """Ten pairs in `train`, four in `test`; the pixels of pair n are all n."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "For the tests."}
    code_path = tfds.core.Path(__file__)

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "caption": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(self._features(features))
        )

    def _features(self, values):
        return values

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(range(10)),
            "test": self._generate_examples(range(10, 14)),
        }

    def _generate_examples(self, numbers):
        for n in numbers:
            values = {
                "image": np.full((4, 4, 3), n, np.uint8),
                "caption": f"number {n}",
                "label": n % 2,
            }
            yield n, self._features(values)


class TinyCaptions(TinyPairs):
    """`TinyPairs` without its pictures."""

    def _features(self, values):
        return {key: value for key, value in values.items() if key != "image"}


class TinyImages(TinyPairs):
    """`TinyPairs` without its captions."""

    def _features(self, values):
        return {key: value for key, value in values.items() if key != "caption"}


def prepare(builder, data_dir, shards=4):
    """Writes a TFDS data set in so many shards and returns what reads it."""
    builder = builder(data_dir=str(data_dir))
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=shards, try_download_gcs=False)
    )
    return builder


def write_tar(path, samples):
    """A WebDataset shard: files by extension, by key."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
