"""A source once through, in its order, by TensorFlow's threads: what is good and what is not."""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from clip_jax.data.faults import UNDECODABLE_IMAGE, UNREADABLE_SHARD, Fault
from clip_jax.data.pipeline import pipeline_options
from clip_jax.data.rows import columns_of, examine, reason, signature
from clip_jax.data.source import Features, Record, Source

_GROUP = 64  # records handed to TensorFlow at once


class Scanned(NamedTuple):
    """A record, or a shard that ends before its time.

    Attributes:
        shard: the path.
        key: of the record; empty for the fault of a whole shard.
        values: what `row` gave, as arrays; nothing where there is a fault.
        fault: why it did not.
    """

    shard: str
    key: str
    values: dict[str, Any]
    fault: Fault | None = None


def scan(
    source: Source,
    shards: Sequence[int],
    row: Callable[[Features], Features],
    max_pixels: int,
    parallel: int,
) -> Iterator[Scanned]:
    """Yields every record of some shards.

    Args:
        source: whose they are.
        shards: their numbers, in the order to read them.
        row: fields -> what is wanted of a record, in TensorFlow; raises where it is bad.
        max_pixels: as config.data.max_pixels, to say why `row` raised.
        parallel: records in work at once.
    """
    underway: collections.deque[tuple[str, Record]] = collections.deque()

    def columns() -> Iterator[dict[str, np.ndarray]]:
        group: list[Record] = []
        for path, record in _records(source, shards):
            underway.append((path, record))
            if record.fault is None:
                group.append(record)
            if len(group) == _GROUP:
                yield columns_of(source.fields, [record.fields for record in group])
                group = []
        if group:
            yield columns_of(source.fields, [record.fields for record in group])

    def next_faults() -> Iterator[Scanned]:
        while underway and underway[0][1].fault is not None:
            path, record = underway.popleft()
            yield Scanned(path, record.key, {}, record.fault)

    rows = (
        tf.data.Dataset.from_generator(columns, output_signature=signature(source.fields))
        .prefetch(1)
        .unbatch()
        .map(row, num_parallel_calls=parallel, deterministic=True)
        .with_options(pipeline_options(parallel + 1))  # one reads
    )
    iterator = iter(rows)
    while True:
        problem, values = "", {}
        try:  # a record that raises costs itself: the iterator goes on behind it
            values = {name: value.numpy() for name, value in next(iterator).items()}
        except StopIteration:
            break
        except tf.errors.OpError as error:
            problem = reason(error)
        yield from next_faults()
        path, record = underway.popleft()
        fault = None
        if not values:
            fault = examine(source, record.fields, max_pixels)
            fault = fault or Fault(UNDECODABLE_IMAGE, problem)
        yield Scanned(path, record.key, values, fault)
    yield from next_faults()


def _records(source: Source, shards: Sequence[int]) -> Iterator[tuple[str, Record]]:
    for shard in shards:
        path = str(source.shards[shard])
        try:
            for record in source.read(shard, 0, 0):
                yield path, record
        except tf.errors.OpError as error:
            yield path, Record("", 0, {}, fault=Fault(UNREADABLE_SHARD, reason(error)))
