"""What is wrong with data: kinds, counted and logged, until it is too much.

A record that cannot be used is left out and counted here; the run goes on. Once more than
`config.data.max_bad` of what was read is bad, it stops.
"""

import collections
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from absl import logging

from clip_jax.errors import DataError

# Of a shard, or of the place in it: what comes out is less than was written.
UNREADABLE_SHARD = "unreadable_shard"  # it vanished, or the storage failed for too long
TRUNCATED_SHARD = "truncated_shard"
CORRUPT_RECORD = "corrupt_record"  # a checksum or a tar header that is wrong
# Of a record.
MISSING_IMAGE = "missing_image"  # no such member, feature or file
EMPTY_IMAGE = "empty_image"  # of no bytes
HUGE_IMAGE = "huge_image"  # more than config.data.max_pixels by its header: never decoded
UNDECODABLE_IMAGE = "undecodable_image"
MISSING_CAPTION = "missing_caption"  # none, or none with a word in it
MALFORMED_RECORD = "malformed_record"  # not what the format says
# Repaired and used.
INVALID_UTF8 = "invalid_utf8"  # the bytes in question become U+FFFD
LONG_CAPTION = "long_caption"  # cut before it is tokenized

REPAIRED = frozenset({INVALID_UTF8, LONG_CAPTION})

JUDGED_FROM = 200  # records: fewer tell nothing of the share of bad ones
LOG_SECONDS = 10.0  # between two log lines of the same kind
_PENDING = 1000  # diagnoses at once


class Fault(NamedTuple):
    """What is wrong, for the counters and for a person."""

    kind: str
    reason: str


class Faults:
    """The faults of a run. Threads may share it.

    Args:
        max_bad: share of the records, and of the shards, that may be bad.
    """

    def __init__(self, max_bad: float):
        self._max_bad = max_bad
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()
        self._logged: dict[str, float] = {}
        self._examples: collections.deque[str] = collections.deque(maxlen=3)
        self._good = self._dropped = self._shards = self._lost_shards = 0
        self._diagnosing = ThreadPoolExecutor(4, thread_name_prefix="diagnosis")
        self._slots = threading.Semaphore(_PENDING)

    def counts(self) -> dict[str, int]:
        """How many of each kind so far, sorted by name."""
        with self._lock:
            return dict(sorted(self._counts.items()))

    def good(self, records: int) -> None:
        """Counts records that were delivered."""
        with self._lock:
            self._good += records

    def shard(self) -> None:
        """Counts a shard that was begun."""
        with self._lock:
            self._shards += 1

    def report(self, shard: str, key: str, fault: Fault, dropped: bool = True) -> None:
        """Counts a fault, and logs it unless one of its kind was logged a moment ago.

        Args:
            shard: the path.
            key: of the record; empty for a fault of the whole shard.
            fault: what is wrong.
            dropped: whether it counts against the share here; `diagnose` has counted its own.
        """
        where = f"{shard}, record {key}" if key else shard
        now = time.monotonic()
        with self._lock:
            self._counts[fault.kind] += 1
            if fault.kind == UNREADABLE_SHARD:
                self._lost_shards += 1
            elif fault.kind not in REPAIRED:
                self._dropped += dropped
            if fault.kind not in REPAIRED:
                self._examples.append(f"{where}: {fault.reason}")
            count = self._counts[fault.kind]
            silent = now - self._logged.get(fault.kind, -LOG_SECONDS) < LOG_SECONDS
            if not silent:
                self._logged[fault.kind] = now
        if not silent:
            logging.warning("%s (%s so far: %d): %s", where, fault.kind, count, fault.reason)

    def diagnose(self, find: Callable[[], tuple[str, str, Fault]]) -> None:
        """Counts a dropped record now, and finds out in the background what was wrong with it.

        Args:
            find: reads it once more and returns what `report` takes: shard, key and fault.
        """

        def run() -> None:
            try:
                self.report(*find(), dropped=False)
            finally:
                self._slots.release()

        with self._lock:
            self._dropped += 1
        self._slots.acquire()
        self._diagnosing.submit(run)

    def settle(self) -> None:
        """Waits for the diagnoses; none may follow."""
        self._diagnosing.shutdown(wait=True)

    def check(self, unseen: int = 0) -> None:
        """Stops a run whose data is rotten.

        Args:
            unseen: records that are known to have been dropped but not yet counted.

        Raises:
            DataError: more than the allowed share is bad; the message has numbers and examples.
        """
        with self._lock:
            dropped, records = self._dropped + unseen, self._good + self._dropped + unseen
            too_many = records >= JUDGED_FROM and dropped > self._max_bad * records
            # A lost shard may hold ten thousand records or one: shards are judged by themselves,
            # once there are enough of them for one to be a small share.
            too_few = self._lost_shards > max(self._max_bad * self._shards, 2)
        if too_many or too_few:
            self.settle()
            raise DataError(self._verdict(dropped, records))

    def _verdict(self, dropped: int, records: int) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.counts().items())
        examples = "".join(f"\n  {example}" for example in self._examples)
        return (
            f"{dropped} of {records} records and {self._lost_shards} of {self._shards} shards are "
            f"bad ({kinds}), more than config.data.max_bad={self._max_bad} allows. Write the "
            f"shards again, or raise it. The latest:{examples}"
        )
