"""The order of the training data: a pure function of (seed, position), whatever the hosts.

The shards are dealt out to S streams, fixed by the configuration. A stream goes through its shards
epoch after epoch, in a new order each time, shuffles their records within a bounded window, and
numbers them: its tickets. Every batch takes the same share of each stream, so a stream's position
is one integer, and a host that reads some of the streams holds the same rows of every batch as if
there were one host only.
"""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from clip_jax.data.sources import Source
from clip_jax.errors import DataError

_FOREVER = np.iinfo(np.int64).max


@dataclasses.dataclass(frozen=True)
class Order:
    """The streams of a run, and where each of them stands.

    Attributes:
        spec: of the source; a position means nothing for another one.
        seed: of shuffles and of everything random that a record goes through.
        window: records that are shuffled together in a stream.
        positions: by stream, how many records it has given.
    """

    spec: str
    seed: int
    window: int
    positions: tuple[int, ...]

    @classmethod
    def start(cls, source: Source, seed: int, streams: int, shuffle_window: int) -> "Order":
        """The beginning; no more streams than the source has shards."""
        if streams < 1:
            raise DataError(f"config.data.streams={streams}; at least one is needed")
        streams = min(streams, len(source.shards))
        return cls(source.spec, seed, max(shuffle_window // streams, 1), (0,) * streams)

    def resume(self, saved: dict[str, Any]) -> "Order":
        """The order at a saved position.

        Raises:
            DataError: the position is one of other data or of another order.
        """
        order = type(self).from_dict(saved)
        differences = [
            f"{field.name}: {getattr(order, field.name)} there, {getattr(self, field.name)} now"
            for field in dataclasses.fields(self)
            if field.name != "positions" and getattr(order, field.name) != getattr(self, field.name)
        ]
        if len(order.positions) != len(self.positions):
            differences.append(f"streams: {len(order.positions)} there, {len(self.positions)} now")
        if differences:
            raise DataError(
                "the checkpoint's place in the data is one of another order: "
                f"{'; '.join(differences)}. Set config.seed and config.data back, or start a new "
                "--workdir from these weights with config.train.init_from"
            )
        return order

    def after(self, batches: int, batch_size: int) -> "Order":
        """The order once `batches` more global batches are taken."""
        taken = batches * self.rows_per_stream(batch_size)
        return dataclasses.replace(self, positions=tuple(p + taken for p in self.positions))

    def rows_per_stream(self, batch_size: int) -> int:
        """Rows of a global batch that come from each stream."""
        streams = len(self.positions)
        if batch_size % streams:
            raise DataError(
                f"the {streams} streams do not divide train.batch_size={batch_size}; set "
                "config.data.streams to a divisor of it"
            )
        return batch_size // streams

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return dataclasses.asdict(self) | {"positions": list(self.positions)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Order":
        """The inverse of `to_dict`."""
        return cls(**(values | {"positions": tuple(values["positions"])}))


def fold_in(seed: Any, *numbers: Any) -> tf.Tensor:
    """Derives a seed, int64 [2], from another one and numbers, in TensorFlow."""
    seed = tf.convert_to_tensor(seed, tf.int64)
    for number in numbers:
        seed = tf.random.experimental.stateless_fold_in(seed, tf.cast(number, tf.int64))
    return seed


def ordered_records(
    source: Source, order: Order, batch_size: int, host: int, hosts: int
) -> tf.data.Dataset:
    """Endless records of this host, batch after batch.

    Yields, for each record: `record` serialized bytes; `shard` and `index`, where it was read;
    `stream` and `ticket`, int64, which name it among all that will ever be read.

    Raises:
        DataError: streams that the hosts cannot share out, or that the batch does not divide into.
    """
    streams = len(order.positions)
    if streams % hosts:
        raise DataError(
            f"{streams} streams cannot be shared out among {hosts} hosts; the source needs a "
            f"multiple of {hosts} shards and config.data.streams a multiple of {hosts}"
        )
    rows = order.rows_per_stream(batch_size)
    own = range(host * streams // hosts, (host + 1) * streams // hosts)
    turns = np.repeat(np.arange(len(own), dtype=np.int64), rows)
    return tf.data.Dataset.choose_from_datasets(
        [_stream(source, order, stream) for stream in own],
        tf.data.Dataset.from_tensor_slices(turns).repeat(),
    )


def _stream(source: Source, order: Order, stream: int) -> tf.data.Dataset:
    streams = len(order.positions)
    shards = source.shards[stream::streams]
    paths = tf.constant([shard.path for shard in shards])
    skips = tf.constant([shard.skip for shard in shards], tf.int64)
    takes = tf.constant([shard.take for shard in shards], tf.int64)

    def read(shard: tf.Tensor) -> tf.data.Dataset:
        path = paths[shard]
        records = tf.data.TFRecordDataset(path, buffer_size=1 << 20).enumerate()
        records = records.skip(skips[shard]).take(takes[shard])
        return records.map(lambda index, record: {"shard": path, "index": index, "record": record})

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        # Of this function's graph only: tf.random.set_seed would change the order below.
        tf.compat.v1.set_random_seed(None)
        seed = fold_in([order.seed, 0], stream, number)
        ranks = tf.random.stateless_uniform([len(shards)], seed)
        records = tf.data.Dataset.from_tensor_slices(tf.argsort(ranks)).flat_map(read)
        shuffle_seed = tf.random.stateless_uniform(
            [], fold_in(seed, 1), minval=0, maxval=_FOREVER, dtype=tf.int64
        )
        return records.shuffle(order.window, seed=shuffle_seed, reshuffle_each_iteration=False)

    # Where the shards' lengths are known, whole epochs need not be read to be skipped.
    position, first_epoch = order.positions[stream], 0
    if source.counts is None:
        empty = all(_is_empty(shard.path) for shard in shards)  # as a rule, looks at one only
    else:
        length = sum(source.counts[stream::streams])
        empty = length == 0
    if empty:  # epoch after epoch without end
        raise DataError(
            f"{source.spec}: stream {stream} of {streams} holds no record, all its shards are "
            f"empty, such as {shards[0].path}; leave them out or lower config.data.streams"
        )
    if source.counts is not None:
        first_epoch, position = divmod(position, length)
    records = tf.data.Dataset.range(first_epoch, _FOREVER).flat_map(epoch).skip(position)
    return records.enumerate(order.positions[stream]).map(
        lambda ticket, record: record | {"stream": tf.constant(stream, tf.int64), "ticket": ticket}
    )


def find_unreadable_shard(
    source: Source, order: Order, batch_size: int, host: int, hosts: int
) -> str | None:
    """The path of the shard at which `ordered_records` fails in its first batch, if it does again.

    TensorFlow's own message names a file that is missing, but not one that is damaged.
    """
    # Shard by shard, from the last good record to the end of what the shuffle reads ahead.
    before = tuple(max(position - 1, 0) for position in order.positions)
    plain = dataclasses.replace(order, window=1, positions=before)
    batches = 1 + -(-(1 + order.window) // order.rows_per_stream(batch_size))
    records = ordered_records(source, plain, batch_size, host, hosts)
    latest: dict[int, str] = {}  # by stream, the shard whose record was the last to be read
    try:
        for record in records.take(batches * batch_size // hosts).as_numpy_iterator():
            latest[int(record["stream"])] = record["shard"].decode()
    except tf.errors.OpError:
        # In the rest of one of these shards, or at the start of one that comes after it.
        for path in latest.values():
            if not _is_readable(path):
                return path
        for shard in source.shards:
            if not _is_readable(shard.path, 1):
                return shard.path
    return None


def _is_readable(path: str, records: int = -1) -> bool:
    try:
        tf.data.TFRecordDataset(path).take(records).reduce(0, lambda count, _: count + 1)
    except tf.errors.OpError:
        return False
    return True


def _is_empty(path: str) -> bool:
    try:
        return tf.io.gfile.stat(path).length == 0
    except tf.errors.OpError:
        return False  # reading it will tell why
