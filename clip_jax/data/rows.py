"""Streams of records -> streams of rows, in TensorFlow's threads; and where each stream stands."""

import collections
import functools
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from clip_jax.data import augment, faults, images
from clip_jax.data.augment import DRAWS, Augmentation
from clip_jax.data.faults import Fault, Faults
from clip_jax.data.order import Place, Stream
from clip_jax.data.source import Features, Source
from clip_jax.errors import DataError
from clip_jax.resize import canvas_size

LONGEST_CAPTION = 1 << 14  # bytes; the context holds far fewer


def caption_text(caption: bytes) -> tuple[str, Fault | None]:
    """The caption as text, cut to the limit; and what had to be mended."""
    if len(caption) > LONGEST_CAPTION:
        fault = Fault(faults.LONG_CAPTION, f"cut to {LONGEST_CAPTION} bytes")
        return caption[:LONGEST_CAPTION].decode(errors="replace"), fault
    try:
        return caption.decode(), None
    except UnicodeDecodeError as error:
        return caption.decode(errors="replace"), Fault(faults.INVALID_UTF8, str(error))


class RowFunction:
    """A record's fields and draws -> the row of a batch: what TensorFlow does to a record.

    Args:
        source: whose records they are.
        config: the `data` section.
        size: of the square picture.
        on_device: leave the resize to the train step.

    Attributes:
        traced: the function.
        image_shape: of pictures in a batch; a smaller one lies in the top left corner.

    Raises:
        DataError: a source without captions or labels, or options out of range.
    """

    def __init__(self, source: Source, config: ConfigDict, size: int, *, on_device: bool = False):
        self._source = source
        self._size = size
        self._max_pixels = config.max_pixels
        self._options = Augmentation.from_config(config)
        self._on_device = on_device
        side = canvas_size(size) if on_device else size
        self.image_shape = (side, side, 3)
        self._templates: tf.Tensor | None = None
        if not source.has_captions:
            self._templates = _templates(source, config.templates)
        # Once for all streams of the source.
        self.traced = tf.function(self._row, autograph=False)

    def _row(self, fields: Features) -> Features:
        """Raises where the record is bad, in TensorFlow: the picture, or no caption."""
        draws = fields["draws"]
        features = self._source.parse({name: fields[name] for name in self._source.fields})
        image = features["image"]
        size = images.within(images.read_size(image), self._max_pixels)
        box = augment.draw_box(size, self._options, draws)
        row = {"caption": self.caption(features, draws), "ticket": fields["ticket"]}
        if self._on_device:
            pixels, place = images.decode_canvas(image, size, box, self._size)
            pixels = augment.recolor(pixels, self._options, draws)
            return row | {"image": pixels, "box": place}
        pixels = images.resize(images.decode_box(image, box), self._size)
        return row | {"image": augment.recolor(pixels, self._options, draws)}

    def caption(self, features: Features, draws: tf.Tensor) -> tf.Tensor:
        """One of those there are, cut one byte behind the limit."""
        captions, weights = features["captions"], features["weights"]
        if self._templates is not None:
            captions = self._templates[features["label"]]
            weights = tf.ones_like(captions, tf.float32)
        chosen = augment.choose_caption(captions, weights, draws)
        return tf.strings.substr(chosen, 0, LONGEST_CAPTION + 1)

    def examine(self, fields: Mapping[str, Any]) -> Fault | None:
        """What is wrong with a record that was dropped, found out step by step."""
        fault = examine(self._source, fields, self._max_pixels)
        if fault is not None or self._templates is None:
            return fault
        label, labels = int(features_of(self._source, fields)["label"]), len(self._templates)
        if 0 <= label < labels:
            return None
        return Fault(faults.MALFORMED_RECORD, f"label {label}; there are {labels} names")


def examine(source: Source, fields: Mapping[str, Any], max_pixels: int) -> Fault | None:
    """What is wrong with a record's picture, or with the captions of a source that has them."""
    try:
        features = features_of(source, fields)
        image = features["image"]
        if not image.numpy():
            return Fault(faults.EMPTY_IMAGE, "the picture is missing, or a file of no bytes")
    except tf.errors.NotFoundError as error:
        return Fault(faults.MISSING_IMAGE, reason(error))
    except tf.errors.OpError as error:
        return Fault(faults.MALFORMED_RECORD, reason(error))
    try:
        height, width = map(int, images.read_size(image))
        if height * width > max_pixels:
            return Fault(
                faults.HUGE_IMAGE,
                f"{width} x {height} pixels; config.data.max_pixels={max_pixels}",
            )
        images.decode(image)
    except tf.errors.OpError as error:
        return Fault(faults.UNDECODABLE_IMAGE, reason(error))
    if source.has_captions:
        usable = augment.has_words(features["captions"]) & (features["weights"] > 0)
        if not tf.reduce_any(usable):
            return Fault(faults.MISSING_CAPTION, "there is none, or none with a word in it")
    return None


def features_of(source: Source, fields: Mapping[str, Any]) -> Features:
    """`source.parse` of one record."""
    columns = columns_of(source.fields, [fields])
    return source.parse(
        {name: tf.constant(columns[name][0], spec.dtype) for name, spec in source.fields.items()}
    )


def _templates(source: Source, templates: tuple[str, ...]) -> tf.Tensor:
    """Captions by label: [labels, templates]."""
    if source.label_names is None:
        raise DataError(
            f"{source.spec} has neither captions nor labels with names, only "
            f"{', '.join(source.features)}; name the caption's field in config.data.captions"
        )
    return tf.constant(
        [[template.format(name) for template in templates] for name in source.label_names]
    )


class _Ahead(NamedTuple):
    """A window that was read but is not behind yet, without its records."""

    start: Place
    end: Place
    keys: list[str]
    shards: list[int]
    offsets: list[tuple[int, int]]


class Reader:
    """One stream as rows, and where it stands once they are delivered.

    A bad record costs nobody but itself: TensorFlow drops the row of a bad one, its ticket is
    missing among those delivered, and the record is looked at again to say why.

    Args:
        stream: the records.
        row: what becomes of one.
        parallel: records in work at once.
        rows: of the stream in a batch, at most.
        faults: takes those that were dropped.

    Attributes:
        failure: why the rows ended; they go on for ever otherwise.
    """

    def __init__(self, stream: Stream, row: RowFunction, parallel: int, rows: int, faults: Faults):
        self.failure: Exception | None = None
        self.place = stream.place
        self._stream = stream
        self._row = row
        self._parallel = parallel
        # No more than these can be on their way: in work, in one batch that is being filled, in two
        # that are ready and in one that is being delivered.
        self._underway = parallel + 4 * rows
        self._faults = faults
        self._next = self.place.ticket + self.place.taken
        self._lock = threading.Lock()
        self._ahead: collections.deque[_Ahead] = collections.deque()

    def dataset(self) -> tf.data.Dataset:
        """Endless rows: what `RowFunction` gives; `caption` and `ticket` among it."""
        fields = {
            "draws": tf.TensorSpec([DRAWS], tf.float32),
            "ticket": tf.TensorSpec([], tf.int64),
        }
        fields |= self._stream.source.fields
        return (
            tf.data.Dataset.from_generator(self._windows, output_signature=signature(fields))
            .prefetch(1)
            .unbatch()
            .map(self._row.traced, num_parallel_calls=self._parallel, deterministic=True)
            .ignore_errors()
        )

    def _windows(self) -> Iterator[dict[str, np.ndarray]]:
        """The windows as columns; ends, with `failure` set, instead of raising."""
        begin = self.place.taken
        try:
            for window in self._stream.windows():
                self._check_lost()
                records = window.records[begin:]
                keys = [record.key for record in window.records]
                with self._lock:
                    self._ahead.append(
                        _Ahead(window.start, window.end, keys, window.shards, window.offsets)
                    )
                tickets = window.start.ticket + np.arange(begin, begin + len(records))
                columns = {
                    "draws": self._stream.draws(tickets, DRAWS),
                    "ticket": tickets,
                } | columns_of(self._stream.source.fields, [record.fields for record in records])
                begin = 0
                del window, records  # TensorFlow has its own copy; there must not be two
                if len(tickets):
                    yield columns
                del columns
        except Exception as error:
            self.failure = error

    def _check_lost(self) -> None:
        """Notices records that never arrive: where all are bad, nobody else would."""
        fed = self._ahead[-1].start.ticket if self._ahead else 0
        lost = fed - self._next - self._underway
        if lost > 0:
            try:
                self._faults.check(lost)
            except DataError:
                for ticket in range(self._next, self._next + 3):
                    self._faults.report(*self._find(ticket), dropped=False)
                self._faults.check(lost)

    def deliver(self, tickets: np.ndarray) -> None:
        """Takes note of tickets that have become rows, in their order.

        Raises:
            DataError: too many others have not.
        """
        if not len(tickets):
            return
        behind = int(tickets[-1]) + 1
        missing = np.setdiff1d(np.arange(self._next, behind), tickets)
        for ticket in map(int, missing):
            address = self._address(ticket)
            self._faults.diagnose(functools.partial(self._examine, *address))
        self._faults.good(len(tickets))
        self._next = behind
        with self._lock:
            while self._ahead and self._ahead[0].end.ticket <= behind:
                self.place = self._ahead.popleft().end
            # Only once one of its tickets is behind: the place must not tell how far ahead this is.
            if self._ahead and self._ahead[0].start.ticket < behind:
                start = self._ahead[0].start
                self.place = start._replace(taken=behind - start.ticket)
        if len(missing):
            self._faults.check()

    def name(self, ticket: int) -> tuple[str, str]:
        """The shard and the key of a record that is ahead still."""
        shard, key, _, _ = self._address(ticket)
        return str(self._stream.source.shards[shard]), key

    def _address(self, ticket: int) -> tuple[int, str, int, int]:
        with self._lock:
            windows = tuple(self._ahead)
        for window in windows:
            if window.start.ticket <= ticket < window.end.ticket:
                at = ticket - window.start.ticket
                return window.shards[at], window.keys[at], *window.offsets[at]
        raise KeyError(ticket)

    def _find(self, ticket: int) -> tuple[str, str, Fault]:
        return self._examine(*self._address(ticket))

    def _examine(self, shard: int, key: str, offset: int, index: int) -> tuple[str, str, Fault]:
        source = self._stream.source
        path = str(source.shards[shard])
        try:
            record = next(iter(source.read(shard, offset, index)))
            fault = record.fault or self._row.examine(record.fields)
        except (tf.errors.OpError, StopIteration) as error:
            fault = Fault(faults.UNREADABLE_SHARD, str(error))
        return path, key, fault or Fault(faults.UNDECODABLE_IMAGE, "it failed once")


def signature(fields: Mapping[str, tf.TensorSpec]) -> dict[str, tf.TensorSpec]:
    """Of the columns of some records."""
    return {name: tf.TensorSpec([None, *spec.shape], spec.dtype) for name, spec in fields.items()}


def columns_of(
    fields: Mapping[str, tf.TensorSpec], records: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """Records -> an array for each field; lists are filled up to the longest, with weight 0."""
    return {
        name: _column(spec, [record[name] for record in records]) for name, spec in fields.items()
    }


def _column(spec: tf.TensorSpec, values: list[Any]) -> np.ndarray:
    dtype = spec.dtype.as_numpy_dtype
    if spec.shape.rank == 0:
        return np.array(values, dtype)
    filling = b"" if spec.dtype == tf.string else 0
    # TensorFlow's unbatch crashes on strings of the shape [n, 0]: at least one column.
    column = np.full((len(values), max([1, *map(len, values)])), filling, dtype)
    for row, value in zip(column, values, strict=True):
        row[: len(value)] = value
    return column


def reason(error: tf.errors.OpError) -> str:
    """What went wrong, without the places in the graph."""
    return re.sub(r"\{\{.*?\}\}|\[Op:.*", "", error.message.splitlines()[0]).strip(" .")
