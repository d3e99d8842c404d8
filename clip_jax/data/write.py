"""Turns any source into shards: WebDataset tars or TFRecords, with an index beside them.

    python -m clip_jax.data.write SOURCE --out=DIR [--format=tar] [--samples=10000] [--workers=8]

A shard has its name only when it is complete, and is not written again: the same command goes on
where it was stopped. `index.json` names the shards with their samples and bytes, and what was left
out; pictures are copied as they are.
"""

import collections
import concurrent.futures
import contextlib
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from etils import epath
from tqdm import tqdm

from clip_jax.data import augment, command, images, tfrecord
from clip_jax.data.faults import Faults
from clip_jax.data.pipeline import usable_cores
from clip_jax.data.scan import scan
from clip_jax.data.source import Features, Source
from clip_jax.data.sources import open_source
from clip_jax.errors import DataError

INDEX = "index.json"

_ENDINGS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"BM": "bmp"}


_Sample = Mapping[str, Any]  # image, captions and label as arrays
_Add = Callable[[str, _Sample], None]  # to a shard, with a key


class Written(NamedTuple):
    """A finished shard."""

    name: str
    samples: int
    bytes: int
    bad: dict[str, int]  # records left out, by kind


class _Stopped(Exception):
    """A shard was not finished, because the others are not wanted any more."""


def write_shards(
    source: Source, out: epath.PathLike, kind: str, samples: int, workers: int, max_pixels: int
) -> list[Written]:
    """Writes what is not there yet, and the index.

    Args:
        source: any; a shard of it becomes a shard, and of files `samples` go into one.
        out: the folder.
        kind: tar or tfrecord.
        samples: as above.
        workers: shards that are written at once.
        max_pixels: pictures of more are left out.

    Raises:
        DataError: the folder holds what another source, or another way to cut it, has left there.
    """
    folder = epath.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files = source.counts is not None and set(source.counts) == {1}
    step = samples if files else 1
    shards = len(source.shards)
    jobs = [range(start, min(start + step, shards)) for start in range(0, shards, step)]
    _claim(folder, {"source": source.spec, "format": kind, "shards": shards, "step": step})
    if source.label_names is not None:
        names = "".join(f"{name}\n" for name in source.label_names)
        _put(folder / "classnames.txt", lambda file: file.write(names.encode()))
    digits = max(5, len(str(len(jobs))))
    row = _row(source, max_pixels)
    stop = threading.Event()
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        tqdm(total=sum(source.counts) if source.counts else None, unit="sample") as progress,
    ):
        bar = _Bar(progress, stop, len(jobs))

        def write(number: int) -> Written:
            path = folder / f"{number:0{digits}d}.{kind}"
            return _write_shard(source, jobs[number], path, kind, row, max_pixels, bar)

        futures = [pool.submit(write, number) for number in range(len(jobs))]
        try:
            written = [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    index = {"format": kind, "shards": [shard._asdict() for shard in written]}
    _put(folder / INDEX, lambda file: file.write(json.dumps(index, indent=1).encode()))
    return written


def _claim(folder: epath.Path, job: dict[str, Any]) -> None:
    """Takes a folder for a job, or finds that the job has it already."""
    note = folder / ".job.json"
    if not note.exists():
        if any(name.name.endswith((".tar", ".tfrecord")) for name in folder.iterdir()):
            raise DataError(f"{folder} holds other shards; choose an empty folder for --out")
        _put(note, lambda file: file.write(json.dumps(job).encode()))
    elif (there := json.loads(note.read_text())) != job:
        raise DataError(
            f"{folder} was begun with {there}, not {job}; choose another folder for --out, or go "
            "on with the same command"
        )


class _Bar:
    """The progress of all workers, who learn from it that they are to stop."""

    def __init__(self, progress: tqdm, stop: threading.Event, shards: int):
        self._progress = progress
        self._stop = stop
        self._lock = threading.Lock()
        self._shards = [0, shards]

    def add(self, samples: int, shards: int = 0) -> None:
        if self._stop.is_set():
            raise _Stopped
        with self._lock:
            self._shards[0] += shards
            self._progress.set_postfix_str("shard {} of {}".format(*self._shards), refresh=False)
            self._progress.update(samples)


def _write_shard(
    source: Source,
    shards: range,
    path: epath.Path,
    kind: str,
    row: Callable[[Features], Features],
    max_pixels: int,
    bar: _Bar,
) -> Written:
    note = path.parent / f".{path.name}.json"  # written after the shard: then it is complete
    if path.exists() and note.exists():
        written = Written(**json.loads(note.read_text()))
        bar.add(written.samples, 1)
        return written
    faults = Faults(max_bad=1.0)
    count = 0

    def write(file: Any) -> None:
        nonlocal count
        with _FORMATS[kind](file) as add:
            records = scan(source, shards, row, max_pixels, parallel=2)
            for number, record in enumerate(records):
                if record.fault is None:
                    add(f"{shards.start:05d}{number:06d}", record.values)
                    count += 1
                else:
                    faults.report(record.shard, record.key, record.fault)
                bar.add(record.fault is None)

    _put(path, write)
    written = Written(path.name, count, path.stat().length, faults.counts())
    _put(note, lambda file: file.write(json.dumps(written._asdict()).encode()))
    bar.add(0, 1)
    return written


def _row(source: Source, max_pixels: int) -> Callable[[Features], Features]:
    """Image, captions and label; raises where one sees without decoding that they are bad."""

    def row(fields: Features) -> Features:
        features = source.parse(fields)
        size = images.within(images.read_size(features["image"]), max_pixels)
        usable = augment.has_words(features["captions"]) & (features["weights"] > 0)
        good = tf.reduce_any(usable) if source.has_captions else True
        with tf.control_dependencies([size, tf.debugging.Assert(good, ["no caption"])]):
            wanted = {"image": tf.identity(features["image"])}
        wanted["captions"] = tf.boolean_mask(features["captions"], usable)
        return wanted | ({"label": features["label"]} if "label" in features else {})

    return tf.function(row, autograph=False)  # traced once for all shards


@contextlib.contextmanager
def _tar(file: Any) -> Iterator[_Add]:
    tar = tarfile.open(fileobj=file, mode="w")  # noqa: SIM115  (only a whole one gets its end)

    def add(key: str, sample: _Sample) -> None:
        members = {_ENDINGS[sample["image"][:2]]: sample["image"]}
        captions = list(sample["captions"])
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
            tar.addfile(info, io.BytesIO(content))

    yield add
    tar.close()


@contextlib.contextmanager
def _tfrecord(file: Any) -> Iterator[_Add]:
    def add(key: str, sample: _Sample) -> None:
        example = tf.train.Example()
        feature = example.features.feature
        feature["key"].bytes_list.value.append(key.encode())
        feature["jpg"].bytes_list.value.append(sample["image"])
        feature["txt"].bytes_list.value.extend(sample["captions"])
        if "label" in sample:
            feature["label"].int64_list.value.append(int(sample["label"]))
        file.write(tfrecord.frame(example.SerializeToString()))

    yield add


_FORMATS: Mapping[str, Callable[[Any], contextlib.AbstractContextManager[_Add]]] = {
    "tar": _tar,
    "tfrecord": _tfrecord,
}


def _put(path: epath.Path, write: Callable[[Any], object]) -> None:
    """Writes a file that appears when it is complete."""
    temporary = path.parent / f".{path.name}.tmp"
    with temporary.open("wb") as file:
        write(file)
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; by default of the process's own arguments."""
    parser = command.parser("clip_jax.data.write", __doc__)
    parser.add_argument("--out", required=True, help="folder for the shards; local or gs://")
    parser.add_argument("--format", default="tar", choices=sorted(_FORMATS), help="of the shards")
    parser.add_argument(
        "--samples",
        type=int,
        default=10_000,
        help="in a shard, where pictures are files; a shard becomes a shard (default: 10000)",
    )
    parser.add_argument(
        "--workers", type=int, default=usable_cores(), help="shards at once; default: one a core"
    )
    given = parser.parse_args(arguments)
    if min(given.samples, given.workers) < 1:
        parser.error("--samples and --workers are at least 1")
    config = command.data_config(given)
    source = open_source(given.source, config)
    written = write_shards(
        source, given.out, given.format, given.samples, given.workers, config.max_pixels
    )
    bad = sum((collections.Counter(shard.bad) for shard in written), collections.Counter())
    samples = sum(shard.samples for shard in written)
    print(f"{samples} samples in {len(written)} shards in {given.out}; left out: {dict(bad)}")


if __name__ == "__main__":
    command.run(main)
