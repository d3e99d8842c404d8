"""Batches for the device: training batches in exact order, and evaluation batches without loss."""

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
import tensorflow as tf
from jaxtyping import Bool, UInt8
from ml_collections import ConfigDict

from clip_jax.data import images
from clip_jax.data.batch import Batch
from clip_jax.data.order import Order, find_unreadable_shard, fold_in, ordered_records
from clip_jax.data.sources import Source
from clip_jax.errors import DataError
from clip_jax.preprocess import Preprocess
from clip_jax.tokenizer import tokenize

T = TypeVar("T")


class EvalBatch(NamedTuple):
    """Rows of an evaluation set; the rows whose `valid` is False are padding."""

    image: UInt8[np.ndarray, "b H W 3"]
    valid: Bool[np.ndarray, " b"]
    features: dict[str, np.ndarray]


def train_batches(
    source: Source,
    order: Order,
    config: ConfigDict,
    image_size: int,
    context_length: int,
) -> Iterator[Batch]:
    """Endless batches from where `order` stands; this host's rows, in host memory.

    The crop of a record depends on the seed, its stream and its ticket alone.

    Raises:
        DataError: a source without captions, a picture that does not decode, an empty caption, a
            shard that cannot be read; the message names shard and record.
    """
    batch_size = config.train.batch_size
    host, hosts = jax.process_index(), jax.process_count()
    features = tf.data.Dataset.from_tensors(b"").map(source.parse).element_spec
    if features.get("caption") != tf.TensorSpec([], tf.string):
        raise DataError(
            f"{source.spec} has no feature `caption` of one string; it has {', '.join(features)}"
        )

    def to_row(record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        features = source.parse(record["record"])
        seed = fold_in([order.seed, 1], record["stream"], record["ticket"])
        return {
            "image": images.random_square_crop(
                images.decode(features["image"]), image_size, config.data.crop, seed
            ),
            "caption": features["caption"],
            "shard": record["shard"],
            "index": record["index"],
        }

    rows = ordered_records(source, order, batch_size, host, hosts).map(
        to_row, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    rows = rows.batch(batch_size // hosts, drop_remainder=True).prefetch(2)
    iterator = rows.as_numpy_iterator()
    while True:
        try:
            batch = next(iterator)
        except tf.errors.OpError as error:
            fault = _find_fault(source, order, batch_size, host, hosts)
            raise DataError(fault or f"{source.spec}: {_reason(error)}") from error
        yield Batch(batch["image"], _tokenize(batch, context_length))
        order = order.after(1, batch_size)


def _tokenize(batch: dict[str, np.ndarray], context_length: int) -> np.ndarray:
    captions = [caption.decode("utf-8", errors="replace") for caption in batch["caption"]]
    for row, caption in enumerate(captions):
        if not caption.strip():
            raise DataError(
                f"{batch['shard'][row].decode()}, record {batch['index'][row]}: the caption is "
                "empty; write the shard again without the record"
            )
    return tokenize(captions, context_length, truncate=True)


def _find_fault(source: Source, order: Order, batch_size: int, host: int, hosts: int) -> str | None:
    """Reads the batch that failed once more, one record at a time, to name the one at fault."""
    records = ordered_records(source, order, batch_size, host, hosts).take(batch_size // hosts)
    try:
        for record in records:
            try:
                images.decode(source.parse(record["record"])["image"])
            except tf.errors.OpError as error:
                return (
                    f"{record['shard'].numpy().decode()}, record {record['index']}: "
                    f"{_reason(error)}; write the shard again without the record"
                )
    except tf.errors.OpError as error:
        path = find_unreadable_shard(source, order, batch_size, host, hosts)
        return f"{path or source.spec} cannot be read: {_reason(error)}"
    return None


def _reason(error: tf.errors.OpError) -> str:
    """What went wrong, without the places in the graph."""
    return re.sub(r"\{\{.*?\}\}|\[Op:.*", "", error.message.splitlines()[0]).strip(" .")


def eval_batches(source: Source, preprocess: Preprocess, batch_size: int) -> Iterator[EvalBatch]:
    """Every example once, in order, through the evaluation transform.

    The hosts share out the examples; all of them get the same number of batches of
    `batch_size // hosts` rows, so that collectives match, the last ones padded.

    Raises:
        DataError: a picture that does not decode, or a shard that cannot be read.
    """
    host, hosts = jax.process_index(), jax.process_count()
    if batch_size % hosts:
        raise DataError(f"eval.batch_size={batch_size} is not a multiple of the {hosts} hosts")
    rows_per_host = batch_size // hosts

    def to_row(features: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return features | {"image": images.evaluation_pixels(features.pop("image"), preprocess)}

    records = tf.data.Dataset.from_generator(
        lambda: iter(source.shards),
        output_signature=(
            tf.TensorSpec([], tf.string),
            tf.TensorSpec([], tf.int64),
            tf.TensorSpec([], tf.int64),
        ),
    ).flat_map(lambda path, skip, take: tf.data.TFRecordDataset(path).skip(skip).take(take))
    rows = (
        records.shard(hosts, host)
        .map(source.parse)
        .map(to_row, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .batch(rows_per_host)
        .prefetch(2)
    )
    batches = -(-_count(source, records) // batch_size)
    iterator = rows.as_numpy_iterator()
    no_row = {
        key: np.zeros([0, *spec.shape[1:]], spec.dtype.as_numpy_dtype)
        for key, spec in rows.element_spec.items()
    }
    for _ in range(batches):
        try:
            row = next(iterator, no_row)  # the other hosts may have one batch more
        except tf.errors.OpError as error:
            raise DataError(f"{source.spec}: {_reason(error)}") from error
        padded = {key: _pad(value, rows_per_host) for key, value in row.items()}
        yield EvalBatch(
            image=padded.pop("image"),
            valid=np.arange(rows_per_host) < len(row["image"]),
            features=padded,
        )


def _pad(rows: np.ndarray, length: int) -> np.ndarray:
    filling = b"" if rows.dtype == object else 0  # TensorFlow's strings arrive as objects
    shape = (length - len(rows), *rows.shape[1:])
    return np.concatenate([rows, np.full(shape, filling, rows.dtype)])


def _count(source: Source, records: tf.data.Dataset) -> int:
    if source.counts is not None:
        return sum(source.counts)
    try:
        return int(records.reduce(np.int64(0), lambda total, _: total + 1))
    except tf.errors.OpError as error:
        raise DataError(f"{source.spec} cannot be read: {_reason(error)}") from error


class Prefetch(Generic[T]):
    """Runs an iterator in a thread, `depth` items ahead, and measures how long one waits for it.

    An exception in the thread is raised where the item would have been taken.

    Attributes:
        waited: seconds that `next` has blocked so far.
    """

    def __init__(self, items: Iterator[Any], put: Callable[[Any], T], depth: int = 2):
        self.waited = 0.0
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items, put), daemon=True)
        self._thread.start()

    def _run(self, items: Iterator[Any], put: Callable[[Any], T]) -> None:
        try:
            for item in items:
                if not self._offer(put(item)):
                    return
            self._offer(StopIteration())
        except BaseException as error:
            self._offer(error)

    def _offer(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StopIteration
        start = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()
