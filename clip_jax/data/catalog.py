"""Sources from the TFDS catalogue, TFRecord- or ArrayRecord-backed, and the glyphs."""

from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from clip_jax.data import glyphs
from clip_jax.data.shards import STRING, record_reader, weighted
from clip_jax.data.source import Features, Source
from clip_jax.errors import DataError

CAPTIONS = ("caption", "captions", "text", "txt")


def open_tfds(
    spec: str, data_dir: str | None, image: str | None, captions: Mapping[str, float]
) -> Source:
    """Opens `tfds:NAME:SPLIT`; the split may be a part, such as train[:10%].

    Args:
        spec: as above.
        data_dir: where TFDS keeps data sets; None: its own default.
        image: feature; None: `image`.
        captions: probability by feature, "captions/text" for one within another; none: the first
            of `CAPTIONS` that is there, else those that a label makes.

    Raises:
        DataError: no such data set or split, not prepared, or without an image.
    """
    _, _, name_and_split = spec.partition(":")
    name, _, split = name_and_split.partition(":")
    if not split:
        raise DataError(f"{spec!r} names no split; write tfds:{name}:train")
    builder = _builder(spec, name, data_dir)
    instructions = read_instructions(builder, split, repr(spec))
    features = builder.info.features
    image = image or "image"
    if not isinstance(dict(features.items()).get(image), tfds.features.Image):
        raise DataError(f"{name} has no feature `{image}`, only {', '.join(features)}")
    captions = captions or {field: 1.0 for field in CAPTIONS if field in features}
    for field in captions:
        if field.partition("/")[0] not in features:
            raise DataError(f"{name} has no feature `{field}`, only {', '.join(features)}")
    decoders = {
        key: tfds.decode.SkipDecoding()
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }

    def parse(fields: Features) -> Features:
        example = features.deserialize_example(fields["record"], decoders=decoders)
        parsed = {"image": example[image]} | weighted(
            [(_strings(example, field), probability) for field, probability in captions.items()]
        )
        return parsed | ({"label": example["label"]} if "label" in example else {})

    label = dict(features.items()).get("label")
    return Source(
        spec=spec,
        shards=[i.filename for i in instructions],
        read=record_reader([(i.filename, i.skip, i.take) for i in instructions]),
        fields={"record": STRING},
        parse=parse,
        has_captions=bool(captions),
        label_names=(tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else None),
        counts=tuple(
            i.examples_in_shard - i.skip if i.take == -1 else i.take for i in instructions
        ),
    )


def make_builder(name: str, data_dir: epath.PathLike) -> tfds.core.DatasetBuilder:
    """TFDS's builder of a data set, or ours of the glyphs, which prepares them."""
    if name == "glyphs":
        return glyphs.prepare(data_dir)
    return tfds.builder(name, data_dir=data_dir)


def read_instructions(builder: tfds.core.DatasetBuilder, split: str, where: str) -> list[Any]:
    """The shards of a split and what to read of each.

    Raises:
        DataError: no such split of what is there at `where`, or an empty one.
    """
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        splits = ", ".join(builder.info.splits)
        raise DataError(f"{where} has the splits {splits}: {error}") from error
    if not instructions:
        raise DataError(f"{where} holds no example in {split!r}")
    return instructions


def _builder(spec: str, name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    try:
        builder = make_builder(name, data_dir or tfds.core.constants.DATA_DIR)
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
    formats = (tfds.core.FileFormat.TFRECORD, tfds.core.FileFormat.ARRAY_RECORD)
    if builder.info.file_format not in formats:
        raise DataError(
            f"{name} is stored as {builder.info.file_format}; only TFRecord and ArrayRecord can be "
            "read"
        )
    return builder


def _strings(example: Mapping[str, Any], field: str) -> tf.Tensor:
    """A feature, or one within another, as strings [K]."""
    value: Any = example
    for name in field.split("/"):
        if not isinstance(value, Mapping) or name not in value:
            raise DataError(f"{field}: there is no {name!r} in it; write FEATURE/FEATURE")
        value = value[name]
    if isinstance(value, Mapping) or getattr(value, "dtype", None) != tf.string:
        raise DataError(f"{field} is no text but {value}")
    return tf.reshape(value, [-1])
