"""Turns any source into shards: WebDataset tars or TFRecords, with an index beside them.

    python -m clip_jax.data.write SOURCE --out=DIR [--format=tar] [--samples=10000] [--workers=8]

Every shard appears under its name only when it is complete, and is not written again: the same
command goes on where it was stopped. `index.json` names the shards with their samples and bytes.
"""

import concurrent.futures
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorflow as tf
from absl import app, flags
from etils import epath
from tqdm import tqdm

from clip_jax.config import default_config
from clip_jax.data import tfrecord
from clip_jax.data.rows import features_of, reason
from clip_jax.data.source import Source
from clip_jax.data.sources import open_source
from clip_jax.errors import UserError

INDEX = "index.json"

_OUT = flags.DEFINE_string("out", None, "Folder for the shards; local or gs://.")
_FORMAT = flags.DEFINE_enum("format", "tar", ["tar", "tfrecord"], "Of the shards.")
_SAMPLES = flags.DEFINE_integer("samples", 10_000, "In a shard, where pictures are files.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Shards at once; default: as many as cores.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Of TFDS; default: TFDS's own.")
_IMAGE = flags.DEFINE_string("image_field", None, "As config.data.image_field.")
_CAPTIONS = flags.DEFINE_list("captions", None, "As config.data.captions, separated by commas.")

_ENDINGS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"BM": "bmp"}


class Written(NamedTuple):
    """A finished shard."""

    name: str
    samples: int
    bytes: int
    bad: int


def write_shards(source: Source, out: str, kind: str, samples: int, workers: int) -> list[Written]:
    """Writes what is not there yet, and the index.

    Args:
        source: any; a shard of it becomes a shard, and of files `samples` go into one.
        out: the folder.
        kind: tar or tfrecord.
        samples: as above.
        workers: shards that are written at once.
    """
    folder = epath.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files = source.counts is not None and set(source.counts) == {1}
    step = samples if files else 1
    jobs = [range(i, min(i + step, len(source.shards))) for i in range(0, len(source.shards), step)]
    digits = max(5, len(str(len(jobs))))

    def write(number: int) -> Written:
        return _write_shard(source, jobs[number], folder / f"{number:0{digits}d}.{kind}", kind)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        done = pool.map(write, range(len(jobs)))
        written = list(tqdm(done, total=len(jobs), unit="shard"))
    index = {"format": kind, "shards": [shard._asdict() for shard in written]}
    _replace(folder / INDEX, json.dumps(index, indent=1).encode())
    return written


def _write_shard(source: Source, shards: range, path: epath.Path, kind: str) -> Written:
    note = path.parent / f".{path.name}.json"  # written after the shard: then it is complete
    if path.exists() and note.exists():
        return Written(**json.loads(note.read_text()))
    frames, count, bad = io.BytesIO(), 0, 0
    with tarfile.open(fileobj=frames, mode="w") if kind == "tar" else frames as file:
        for key, sample in _samples(source, shards):
            if sample is None:
                bad += 1
            elif kind == "tar":
                _add_to_tar(file, key, sample)
                count += 1
            else:
                frames.write(tfrecord.frame(_example(key, sample)))
                count += 1
        content = None if kind == "tar" else frames.getvalue()
    content = frames.getvalue() if content is None else content
    _replace(path, content)
    written = Written(path.name, count, len(content), bad)
    _replace(note, json.dumps(written._asdict()).encode())
    return written


def _samples(source: Source, shards: range) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Key, and image, captions and label; None in place of a record that cannot be read."""
    number = 0
    for shard in shards:
        try:
            for record in source.read(shard, 0, 0):
                key, number = f"{shards.start:05d}{number:06d}", number + 1
                yield key, None if record.fault else _features(source, record.fields)
        except tf.errors.OpError as error:
            tqdm.write(f"{source.shards[shard]} cannot be read: {reason(error)}", file=sys.stderr)
            yield "", None


def _features(source: Source, fields: Any) -> dict[str, Any] | None:
    try:
        features = features_of(source, fields)
    except tf.errors.OpError:
        return None
    image = features["image"].numpy()
    if image[:2] not in _ENDINGS:
        return None
    given = (features["weights"] > 0).numpy()
    sample: dict[str, Any] = {"image": image}
    sample["captions"] = [
        text for text, used in zip(features["captions"].numpy(), given, strict=True) if used
    ]
    if "label" in features:
        sample["label"] = int(features["label"])
    return sample


def _add_to_tar(file: Any, key: str, sample: dict[str, Any]) -> None:
    members = {_ENDINGS[sample["image"][:2]]: sample["image"]}
    captions = sample["captions"]
    if captions:
        members["txt"] = captions[0]
    if len(captions) > 1:
        texts = [text.decode("utf-8", "replace") for text in captions]
        members["json"] = json.dumps({"captions": texts}).encode()
    if "label" in sample:
        members["cls"] = str(sample["label"]).encode()
    for ending, content in members.items():
        info = tarfile.TarInfo(f"{key}.{ending}")
        info.size = len(content)
        file.addfile(info, io.BytesIO(content))


def _example(key: str, sample: dict[str, Any]) -> bytes:
    example = tf.train.Example()
    feature = example.features.feature
    feature["key"].bytes_list.value.append(key.encode())
    feature["jpg"].bytes_list.value.append(sample["image"])
    feature["txt"].bytes_list.value.extend(sample["captions"])
    if "label" in sample:
        feature["label"].int64_list.value.append(sample["label"])
    return example.SerializeToString()


def _replace(path: epath.Path, content: bytes) -> None:
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    temporary.write_bytes(content)
    temporary.replace(path)


def main(argv: list[str]) -> None:
    """The command."""
    if len(argv) != 2 or not _OUT.value:
        raise app.UsageError("expected one SOURCE and --out=DIR")
    config = default_config().data
    config.update(data_dir=_DATA_DIR.value, image_field=_IMAGE.value, captions=_CAPTIONS.value)
    try:
        source = open_source(argv[1], config)
    except UserError as error:
        sys.exit(f"write: {error}")
    workers = _WORKERS.value or os.cpu_count() or 1
    written = write_shards(source, _OUT.value, _FORMAT.value, _SAMPLES.value, workers)
    if source.label_names is not None:
        names = "".join(f"{name}\n" for name in source.label_names)
        _replace(epath.Path(_OUT.value) / "classnames.txt", names.encode())
    samples, bad = sum(s.samples for s in written), sum(s.bad for s in written)
    print(f"{samples} samples in {len(written)} shards in {_OUT.value}; {bad} records left out")


if __name__ == "__main__":
    app.run(main)
