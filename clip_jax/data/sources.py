"""Where pairs come from: a spec string -> shards of records, and how a record is parsed.

Specs:
    tfds:NAME:SPLIT             a prepared TFDS data set with an image and a caption
    PATH[,PATH...]              TFRecord shards; brace patterns ({00000..00099}, {a,b}) and
                                wildcards are expanded; local or gs://
"""

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from clip_jax.data import glyphs
from clip_jax.errors import DataError

Features = dict[str, tf.Tensor]


class Shard(NamedTuple):
    """A TFRecord file, or the run of its records that belongs to a split."""

    path: str
    skip: int = 0
    take: int = -1  # -1: to the end


@dataclasses.dataclass(frozen=True)
class Source:
    """Shards of records, and the function that parses one.

    Attributes:
        spec: the string that named it.
        shards: the files, in their order.
        parse: serialized record -> features, in TensorFlow; pictures stay encoded bytes. A source
            for training has `image` and `caption`.
        counts: records by shard, where the source knows them without reading.
        label_names: what the integers of the feature `label` stand for, where it has names.
    """

    spec: str
    shards: tuple[Shard, ...]
    parse: Callable[[tf.Tensor], Features]
    counts: tuple[int, ...] | None = None
    label_names: tuple[str, ...] | None = None


def open_source(spec: str | None, config: ConfigDict) -> Source:
    """Opens what a spec names.

    Args:
        spec: see the module's docstring.
        config: the `data` section: data_dir, image_feature, caption_feature.

    Raises:
        DataError: no spec, nothing there, or features that are not an image and a caption.
    """
    if not spec:
        raise DataError(
            "no data: set config.data.train to tfds:NAME:SPLIT or to TFRecord shards such as "
            "gs://bucket/{00000..00099}.tfrecord"
        )
    if spec.startswith("tfds:"):
        return _open_tfds(spec, config.data_dir)
    return _open_tfrecords(spec, config.image_feature, config.caption_feature)


def _open_tfds(spec: str, data_dir: str | None) -> Source:
    _, _, name_and_split = spec.partition(":")
    name, _, split = name_and_split.partition(":")
    if not split:
        raise DataError(f"{spec!r} names no split; write tfds:{name}:train")
    try:
        if name == "glyphs":
            builder = glyphs.prepare(data_dir or tfds.core.constants.DATA_DIR)
        else:
            builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:  # its message lists all of the catalogue
        where = data_dir or tfds.core.constants.DATA_DIR
        raise DataError(f"TFDS knows no data set {name!r}, nor is there one in {where}") from error
    except ValueError as error:
        raise DataError(f"{spec!r}: {error}") from error
    if not builder.is_prepared():
        raise DataError(
            f"{name} is not prepared in {builder.data_path}; run `tfds build {name}` first, or "
            "point config.data.data_dir at where it is"
        )
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        raise DataError(f"{name} is stored as {builder.info.file_format}; only TFRecord is read")
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        splits = ", ".join(builder.info.splits)
        raise DataError(f"{name} has the splits {splits}: {error}") from error

    features = builder.info.features
    decoders = {
        key: tfds.decode.SkipDecoding()
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }
    if "image" not in decoders:
        raise DataError(f"{name} has no feature `image`, only {', '.join(features)}")
    if not instructions:
        raise DataError(f"{spec!r} holds no example")
    label = dict(features.items()).get("label")
    return Source(
        spec=spec,
        shards=tuple(Shard(i.filename, i.skip, i.take) for i in instructions),
        parse=lambda record: features.deserialize_example(record, decoders=decoders),
        counts=tuple(
            i.examples_in_shard - i.skip if i.take == -1 else i.take for i in instructions
        ),
        label_names=(tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else None),
    )


def _open_tfrecords(spec: str, image_feature: str, caption_feature: str) -> Source:
    string = tf.io.FixedLenFeature([], tf.string)

    def parse(record: tf.Tensor) -> Features:
        values = tf.io.parse_single_example(
            record, {image_feature: string, caption_feature: string}
        )
        return {"image": values[image_feature], "caption": values[caption_feature]}

    return Source(spec=spec, shards=tuple(Shard(path) for path in expand_paths(spec)), parse=parse)


def expand_paths(spec: str) -> list[str]:
    """Commas between, braces within, and wildcards -> the paths, which must exist.

    Raises:
        DataError: a pattern that matches nothing, or a file that is not there.
    """
    paths: list[str] = []
    for pattern in re.split(r",(?![^{]*\})", spec):
        for path in _expand_braces(pattern):
            try:
                found = sorted(tf.io.gfile.glob(path))
            except tf.errors.OpError as error:
                raise DataError(f"cannot list {path}: {error.message}") from error
            if not found:
                raise DataError(f"no shard matches {path} (of config.data.train={spec!r})")
            paths += found
    return paths


def _expand_braces(pattern: str) -> list[str]:
    """{000..009} -> ten names of three digits; {a,b} -> two names; several groups multiply."""
    parts: list[list[str]] = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if numbers:
            first, last = numbers.groups()
            if int(last) < int(first):
                raise DataError(f"{part} counts backwards in {pattern!r}")
            parts.append([f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)])
        elif part.startswith("{"):
            parts.append(part[1:-1].split(","))
        else:
            parts.append([part])
    return ["".join(combination) for combination in itertools.product(*parts)]
