"""Sources that are shards of pairs: WebDataset tars, TFRecords and ArrayRecords of examples."""

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from clip_jax.data import tar, tfrecord
from clip_jax.data.faults import CORRUPT_RECORD, MALFORMED_RECORD, MISSING_IMAGE, Fault
from clip_jax.data.paths import join
from clip_jax.data.reading import ShardFile
from clip_jax.data.source import Features, Record, Source
from clip_jax.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
LABEL = ("cls", "label")
_GROUP = 64  # ArrayRecord: records of one read
_LOOKED_AT = 8  # records of a source, to see what it holds

STRING = tf.TensorSpec([], tf.string)


def pair_fields(picture: str, labels: bool) -> dict[str, tf.TensorSpec]:
    """`Source.fields`: the picture under this name, its captions, and its label if it has one."""
    captions = {
        "captions": tf.TensorSpec([None], tf.string),
        "weights": tf.TensorSpec([None], tf.float32),
    }
    label = {"label": tf.TensorSpec([], tf.int64)} if labels else {}
    return {picture: STRING} | captions | label


def caption_fields(captions: Iterable[tuple[Sequence[bytes], float]]) -> dict[str, list[Any]]:
    """What a record has as `captions` and `weights`: those of a field share its probability."""
    texts, weights = list[bytes](), list[float]()
    for strings, probability in captions:
        texts += strings
        weights += [probability / max(len(strings), 1)] * len(strings)
    return {"captions": texts, "weights": weights}


def open_tars(
    spec: str, paths: Sequence[str], image: str | None, captions: Mapping[str, float]
) -> Source:
    """WebDataset shards.

    Args:
        spec: names them in messages.
        paths: of the shards.
        image: extension of the picture; None: whichever of `IMAGE_EXTENSIONS` a sample has.
        captions: probability by caption: an extension, or a place in a JSON file of the sample
            such as "json/alt" or "json/captions" (a list). None: `txt`, else `json/caption`.

    Raises:
        DataError: the samples lack the picture, or a caption that was asked for.
    """
    samples = _look_at(spec, paths, lambda path: tar.samples(ShardFile(path)))
    found = {extension for sample in samples for extension in sample.files}
    images = (image,) if image else IMAGE_EXTENSIONS
    if not found.intersection(images):
        raise DataError(f"{spec}: no sample has a picture ({', '.join(images)}), {_has(found)}")
    if not captions:
        captions = {"txt" if "txt" in found or "json" not in found else "json/caption": 1.0}
    elif missing := [field for field in captions if field.partition("/")[0] not in found]:
        raise DataError(f"{spec}: no sample has a caption {missing[0]!r}, {_has(found)}")
    label = next((name for name in LABEL if name in found), None)

    def read(shard: int, offset: int, index: int) -> Iterator[Record]:
        del index  # samples are named by their keys
        file = ShardFile(paths[shard], offset)
        try:
            for sample in tar.samples(file):
                yield _from_sample(sample, images, captions, label)
        finally:
            file.close()

    return Source(
        spec=spec,
        shards=paths,
        read=read,
        fields=pair_fields("image", label is not None),
        parse=dict,
        has_captions=any(field.partition("/")[0] in found for field in captions),
        label_names=_class_names(paths[0]) if label else None,
    )


def _from_sample(
    sample: tar.Sample, images: Sequence[str], captions: Mapping[str, float], label: str | None
) -> Record:
    if sample.fault:
        return Record(sample.key, sample.end, {}, fault=sample.fault)
    image = next((sample.files[name] for name in images if name in sample.files), None)
    if image is None:
        fault = Fault(MISSING_IMAGE, f"no {', '.join(images)}, {_has(sample.files)}"[:200])
        return Record(sample.key, sample.end, {}, fault=fault)
    fields: dict[str, Any] = {"image": image}
    try:
        fields |= caption_fields((_texts(sample.files, name), p) for name, p in captions.items())
        if label:
            fields["label"] = int(sample.files[label])
    except (ValueError, KeyError, RecursionError) as error:
        fault = Fault(MALFORMED_RECORD, f"{type(error).__name__}: {error}"[:200])
        return Record(sample.key, sample.end, {}, fault=fault)
    size = len(fields["image"]) + sum(map(len, fields["captions"]))
    return Record(sample.key, sample.end, fields, size)


def _texts(files: Mapping[str, bytes], field: str) -> list[bytes]:
    """The captions that a sample has under a field; there may be none."""
    extension, *path = field.split("/")
    content = files.get(extension)
    if content is None:
        return []
    if not path:
        return [content]
    return caption_strings(functools.reduce(_member, path, json.loads(content)))


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def caption_strings(value: Any) -> list[bytes]:
    """What JSON holds in place of a caption: a string, a list of them, or nothing usable."""
    values = value if isinstance(value, list) else [value]
    return [each.encode("utf-8", "replace") for each in values if isinstance(each, str)]


def _class_names(path: str) -> tuple[str, ...] | None:
    """The classnames.txt beside a shard or in the folder above, as CLIP_benchmark lays them."""
    folder = path.rpartition("/")[0] or "."
    for place in (folder, f"{folder}/.."):
        try:
            with tf.io.gfile.GFile(join(place, "classnames.txt")) as file:
                return tuple(line.strip() for line in file.read().splitlines() if line.strip())
        except tf.errors.OpError:
            continue
    return None


def open_examples(
    spec: str,
    shards: Sequence[tuple[str, int, int]],
    image: str | None,
    captions: Mapping[str, float],
) -> Source:
    """Shards of `tf.train.Example`, TFRecord or (by the ending .array_record) ArrayRecord.

    Args:
        spec: names them in messages.
        shards: path, records to leave out at its beginning, records to take (-1: all).
        image: feature of the encoded picture; None: the first of `IMAGE_EXTENSIONS`, `image`,
            `image/encoded` that is there.
        captions: probability by caption feature; none: `txt` or `caption`.

    Raises:
        DataError: the examples lack the picture, or a caption that was asked for.
    """
    paths = [path for path, _, _ in shards]
    read = record_reader(shards)
    found: dict[str, str] = {}
    for record in _look_at(spec, range(len(shards)), lambda shard: read(shard, 0, 0)):
        example = tf.train.Example.FromString(record.fields["record"])
        found |= {n: str(f.WhichOneof("kind")) for n, f in example.features.feature.items()}
    strings = [name for name, kind in found.items() if kind == "bytes_list"]
    images = (image,) if image else (*IMAGE_EXTENSIONS, "image", "image/encoded")
    chosen = next((name for name in images if name in strings), None)
    if chosen is None:
        raise DataError(f"{spec}: no example has a picture ({', '.join(images)}), {_has(strings)}")
    if not captions:
        captions = {next((n for n in ("txt", "caption") if n in strings), "txt"): 1.0}
    elif missing := [field for field in captions if field not in strings]:
        raise DataError(f"{spec}: no example has a caption {missing[0]!r}, {_has(strings)}")
    label = next((name for name in LABEL if found.get(name) == "int64_list"), None)

    def parse(fields: Features) -> Features:
        texts = tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)
        features: dict[str, Any] = dict.fromkeys((chosen, *captions), texts)
        if label:
            features[label] = tf.io.FixedLenFeature([], tf.int64)
        values = tf.io.parse_single_example(fields["record"], features)
        parsed = {"image": _first(values[chosen])} | weighted(
            [(values[field], probability) for field, probability in captions.items()]
        )
        return parsed | ({"label": values[label]} if label else {})

    return Source(
        spec=spec,
        shards=paths,
        read=read,
        fields={"record": STRING},
        parse=parse,
        has_captions=any(field in strings for field in captions),
        label_names=_class_names(paths[0]) if label else None,
    )


def _first(strings: tf.Tensor) -> tf.Tensor:
    """The first of some strings, or an empty one."""
    return tf.concat([strings, [""]], 0)[0]


def weighted(captions: Sequence[tuple[tf.Tensor, float]]) -> Features:
    """`caption_fields` in TensorFlow, of strings [K] each."""
    counts = [tf.size(texts) for texts, _ in captions]
    weights = [
        tf.repeat(probability / tf.cast(tf.maximum(count, 1), tf.float32), count)
        for count, (_, probability) in zip(counts, captions, strict=True)
    ]
    return {
        "captions": tf.concat([tf.constant([], tf.string), *(texts for texts, _ in captions)], 0),
        "weights": tf.concat([tf.constant([], tf.float32), *weights], 0),
    }


def record_reader(
    shards: Sequence[tuple[str, int, int]],
) -> Callable[[int, int, int], Iterator[Record]]:
    """Reads the serialized records of files of which parts may be taken: `Source.read`."""

    def read(shard: int, offset: int, index: int) -> Iterator[Record]:
        path, skip, take = shards[shard]
        end = take if take >= 0 else None
        records = _array_records if ".array_record" in path else _tf_records
        for number, (place, record) in enumerate(records(path, skip, offset), index):
            if end is not None and number >= end:
                return
            key = str(skip + number)
            if isinstance(record, Fault):
                yield Record(key, place, {}, fault=record)
            else:
                yield Record(key, place, {"record": record}, len(record))

    return read


def _tf_records(path: str, skip: int, offset: int) -> Iterator[tuple[int, bytes | Fault]]:
    file = ShardFile(path, offset)
    try:
        if offset == 0:
            tfrecord.skip_records(file, skip)
        yield from tfrecord.records(file)
    finally:
        file.close()


def _array_records(path: str, skip: int, offset: int) -> Iterator[tuple[int, bytes | Fault]]:
    """Of an ArrayRecord, offsets count records: it is indexed itself."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(path)
    except (ValueError, RuntimeError) as error:
        raise tf.errors.DataLossError(None, None, f"no ArrayRecord: {error}") from error
    try:
        end = reader.num_records()
        for start in range(skip + offset, end, _GROUP):
            numbers = range(start, min(start + _GROUP, end))
            try:
                group: list[bytes | Fault] = reader.read(list(numbers))
            except (ValueError, RuntimeError, IndexError):
                group = [_array_record(reader, number) for number in numbers]
            for number, record in zip(numbers, group, strict=True):
                yield number - skip + 1, record
    finally:
        reader.close()


def _array_record(reader: Any, number: int) -> bytes | Fault:
    try:
        return reader.read([number])[0]
    except (ValueError, RuntimeError, IndexError) as error:
        return Fault(CORRUPT_RECORD, str(error)[:200])


def _look_at(spec: str, shards: Sequence[Any], read: Callable[[Any], Iterator[Any]]) -> list[Any]:
    """The first good records of the first shard that has any."""
    problem = "they hold no record"
    for shard in itertools.islice(shards, _LOOKED_AT):
        try:
            records = itertools.islice((r for r in read(shard) if r.fault is None), _LOOKED_AT)
            if found := list(records):
                return found
        except tf.errors.OpError as error:
            problem = error.message
    raise DataError(f"{spec}: the first shards cannot be read: {problem}")


def _has(names: Any) -> str:
    return f"only {', '.join(sorted(names))}"
