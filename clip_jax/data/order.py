"""The order of the training data: a pure function of the seed, whatever the hosts.

The shards of a source are dealt out to S streams, fixed by the configuration. A stream goes through
its shards epoch after epoch, in a new order each time. It reads a window of them, as many records
as fit into so many bytes, shuffles it, numbers its records (their tickets), gives them out, and
reads the next. Only after that can a record be dropped, because it is damaged: the next good one of
the stream takes its row.

Every batch has the same number of rows from each stream, so a host that reads some of the streams
holds the same rows as if there were one host only. Where a stream stands is six integers: where its
window starts, and how many of its tickets are taken. To resume, it reads that window again, and
nothing else.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorflow as tf
from jax.experimental import multihost_utils

from clip_jax.data.draws import permutation, uniforms
from clip_jax.data.faults import UNREADABLE_SHARD, Fault, Faults
from clip_jax.data.source import Mixture, Record, Source
from clip_jax.errors import DataError

# What the draws of a stream are for: the first of the numbers that they are a function of.
_SHARDS, _WINDOW, _MIXTURE, _TICKET = range(4)


class Place(NamedTuple):
    """Where a stream stands."""

    epoch: int = 0
    rank: int = 0  # of the shard at which the window starts, in the epoch's order
    offset: int = 0  # in that shard, of the window's first record
    before: int = 0  # how many of the shard's records lie before that
    ticket: int = 0  # of the window's first record after the shuffle
    taken: int = 0  # tickets of the window that are behind


@dataclasses.dataclass(frozen=True)
class Order:
    """The streams of a run, and where each of them stands.

    Attributes:
        spec: of the mixture, and its shards; a place means nothing for another one.
        seed: of shuffles and of everything random that a record goes through.
        window: bytes that are shuffled together in a stream.
        rows: rows that each stream has given.
        places: by source, by stream.
    """

    spec: str
    seed: int
    window: int
    rows: int
    places: tuple[tuple[Place, ...], ...]

    @classmethod
    def start(cls, mixture: Mixture, seed: int, streams: int, shuffle_bytes: int) -> "Order":
        """The beginning.

        Args:
            mixture: of one or more sources.
            seed: of everything random.
            streams: the number of hosts must divide it.
            shuffle_bytes: of all streams and sources together, in memory. Half of it is being given
                out while the other half is read.
        """
        if streams < 1:
            raise DataError(f"config.data.streams={streams}; at least one is needed")
        window = max(shuffle_bytes // (2 * streams * len(mixture.sources)), 1)
        places = tuple((Place(),) * streams for _ in mixture.sources)
        shards = ", ".join(str(len(source.shards)) for source in mixture.sources)
        return cls(f"{mixture.spec} ({shards} shards)", seed, window, 0, places)

    @property
    def streams(self) -> int:
        """How many there are."""
        return len(self.places[0])

    def resume(self, saved: dict[str, Any]) -> "Order":
        """The order at a saved place.

        Raises:
            DataError: the place is one of other data or of another order.
        """
        try:
            order = type(self).from_dict(saved)
        except (KeyError, TypeError) as error:
            raise DataError(
                "the checkpoint's place in the data was written by another version of this program;"
                " start a new --workdir from these weights with config.train.init_from"
            ) from error
        differences = [
            f"{name}: {getattr(order, name)} there, {getattr(self, name)} now"
            for name in ("spec", "seed", "window", "streams")
            if getattr(order, name) != getattr(self, name)
        ]
        if differences:
            raise DataError(
                "the checkpoint's place in the data is one of another order: "
                f"{'; '.join(differences)}. Set config.seed and config.data back, or start a new "
                "--workdir from these weights with config.train.init_from"
            )
        return order

    def rows_per_stream(self, batch_size: int) -> int:
        """Rows of a global batch that come from each stream."""
        if batch_size % self.streams:
            raise DataError(
                f"the {self.streams} streams do not divide train.batch_size={batch_size}; set "
                "config.data.streams to a divisor of it"
            )
        return batch_size // self.streams

    def own_streams(self, host: int, hosts: int) -> range:
        """The streams that a host reads."""
        if self.streams % hosts:
            raise DataError(
                f"{self.streams} streams cannot be shared out among {hosts} hosts; set "
                f"config.data.streams to a multiple of {hosts}"
            )
        return range(host * self.streams // hosts, (host + 1) * self.streams // hosts)

    def turns(self, stream: int, count: int, weights: Sequence[float]) -> np.ndarray:
        """The sources of the stream's next rows: int64 [count]."""
        draws = uniforms(1, _MIXTURE, self.seed, stream, self.rows + np.arange(count))[:, 0]
        last = len(weights) - 1
        return np.minimum(np.searchsorted(np.cumsum(weights), draws, side="right"), last)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        places = [[list(place) for place in places] for places in self.places]
        return dataclasses.asdict(self) | {"places": places}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Order":
        """The inverse of `to_dict`."""
        places = tuple(tuple(Place(*place) for place in places) for places in values["places"])
        return cls(**(values | {"places": places}))

    def of_all_hosts(self) -> "Order":
        """The order with each host's own streams where that host has them; all hosts must ask."""
        hosts = jax.process_count()
        if hosts == 1:
            return self
        own = np.array(self.places, np.int64)
        halves = multihost_utils.process_allgather(own.view(np.int32))  # JAX would cut 64 bits
        return self.merged(np.asarray(halves, np.int32).view(np.int64))

    def merged(self, by_host: np.ndarray) -> "Order":
        """Takes each stream's place from its host's: int64 [hosts, sources, streams, 6]."""
        places = [
            [
                Place(*map(int, by_host[stream * len(by_host) // self.streams, source, stream]))
                for stream in range(self.streams)
            ]
            for source in range(len(self.places))
        ]
        return dataclasses.replace(self, places=tuple(map(tuple, places)))


class Window(NamedTuple):
    """Records that were shuffled together, in their new order."""

    start: Place  # `taken` is 0
    end: Place
    records: list[Record]
    shards: list[int]  # by record
    offsets: list[tuple[int, int]]  # by record: offset, and records before it


class Stream:
    """One stream of one source: its windows, from a place on.

    Args:
        source: whose shards it has a share of.
        number: of the source in the mixture, of the stream, and how many streams there are.
        seed: of the order.
        window: bytes that are shuffled together.
        place: where to start.
        faults: takes what cannot be read.

    Attributes:
        source, place: as given.
    """

    def __init__(
        self,
        source: Source,
        number: tuple[int, int, int],
        seed: int,
        window: int,
        place: Place,
        faults: Faults,
    ):
        self.source = source
        self._key = (seed, *number[:2])
        self._window = window
        self.place = place
        self._faults = faults
        self._ranks: tuple[int, np.ndarray] | None = None  # epoch, and the order of its shards
        _, stream, streams = number
        shards = len(source.shards)
        # Where there are fewer shards than streams, several streams share the records of one.
        self._shards = np.arange(stream % shards, shards, min(streams, shards))
        self._part = stream // shards
        self._parts = 1 if shards >= streams else len(range(stream % shards, streams, shards))

    def windows(self) -> Iterator[Window]:
        """Endless.

        Raises:
            DataError: an epoch without a record that can be read, or too many bad ones.
        """
        place, empty_since = self.place._replace(taken=0), -1
        while True:
            window = self._read(place)
            place = window.end
            if window.records:
                empty_since = -1
                yield window
            elif empty_since < 0:
                empty_since = place.epoch
            elif place.epoch > empty_since + 1:
                raise DataError(
                    f"{self.source.spec}: no record can be read of the {len(self._shards)} shards "
                    f"of a stream, such as {self.source.shards[self._shards[0]]}; "
                    f"{self._faults.counts() or 'they are empty'}. If these are few records, set "
                    "config.data.streams to fewer"
                )

    def draws(self, tickets: np.ndarray, count: int) -> np.ndarray:
        """For each ticket, what augmentation draws from: float32 [n, count]."""
        return uniforms(count, _TICKET, *self._key, tickets)

    def _read(self, start: Place) -> Window:
        epoch, rank, offset, index, ticket, _ = start
        if self._ranks is None or self._ranks[0] != epoch:
            self._ranks = epoch, permutation(len(self._shards), _SHARDS, *self._key, epoch)
        ranks = self._ranks[1]
        records: list[Record] = []
        shards: list[int] = []
        offsets: list[tuple[int, int]] = []
        room = self._window
        while rank < len(ranks) and room > 0:
            shard = int(self._shards[ranks[rank]])
            for record in self._records(shard, offset, index):
                if record.fault is None and index % self._parts == self._part:
                    records.append(record)
                    shards.append(shard)
                    offsets.append((offset, index))
                    room -= record.size
                offset, index = record.end, index + 1
                if room <= 0:
                    break
            else:
                rank, offset, index = rank + 1, 0, 0
        end = Place(epoch, rank, offset, index, ticket + len(records), 0)
        if rank == len(ranks):
            end = Place(epoch + 1, 0, 0, 0, end.ticket, 0)
        order = permutation(len(records), _WINDOW, *self._key, ticket)
        return Window(
            start._replace(taken=0),
            end,
            [records[i] for i in order],
            [shards[i] for i in order],
            [offsets[i] for i in order],
        )

    def _records(self, shard: int, offset: int, index: int) -> Iterator[Record]:
        """Those of a shard from an offset on, to its end or to where it cannot be read."""
        path = str(self.source.shards[shard])
        if offset == 0 and self._part == 0:
            self._faults.shard()
        try:
            for record in self.source.read(shard, offset, index):
                if record.fault is not None and index % self._parts == self._part:
                    self._faults.report(path, record.key, record.fault)
                    self._faults.check()
                index += 1
                yield record
        except tf.errors.OpError as error:
            if self._part == 0:
                self._faults.report(path, "", Fault(UNREADABLE_SHARD, error.message))
                self._faults.check()
