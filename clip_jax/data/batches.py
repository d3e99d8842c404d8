"""Training batches for the device, in exact order."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from clip_jax.data.batch import Batch
from clip_jax.data.faults import Faults
from clip_jax.data.order import Order, Stream
from clip_jax.data.pipeline import keep_freed_memory, pipeline_options, usable_cores
from clip_jax.data.prefetch import Prefetch
from clip_jax.data.rows import Reader, RowFunction, caption_text
from clip_jax.data.source import Mixture
from clip_jax.tokenizer import tokenize

# Records in work at once on a host, at least. A thread that hands a row on and finds the next one
# waiting need not sleep in between: with eight streams small pictures cost half.
_IN_WORK = 128


class TrainBatch(NamedTuple):
    """What the step takes, and what the loop must know beside it."""

    batch: Batch  # this host's rows, in host memory
    order: Order  # where the data stands once the batch is taken; of this host's streams
    faults: Faults  # what was bad so far; on this host


def train_batches(
    mixture: Mixture,
    order: Order,
    config: ConfigDict,
    image_size: int,
    context_length: int,
    *,
    on_device: bool = False,
) -> Iterator[TrainBatch]:
    """Endless batches from where `order` stands.

    What happens to a record depends on the seed, its stream and its ticket alone. Bad records are
    left out and counted.

    Args:
        mixture: of sources with captions, or with labels that have names.
        order: of the mixture.
        config: of the run; the `data` section and train.batch_size.
        image_size: of the square pictures.
        context_length: of the tokens.
        on_device: leave the resize to the train step: pictures come with the box of their crop.

    Raises:
        DataError: a mixture without captions, streams that hosts or batch cannot share out, or more
            bad data than config.data.max_bad allows.
    """
    keep_freed_memory()
    batch_size = config.train.batch_size
    host, hosts = jax.process_index(), jax.process_count()
    order.rows_per_stream(batch_size)
    order.own_streams(host, hosts)
    functions = [
        RowFunction(source, config.data, image_size, on_device=on_device)
        for source in mixture.sources
    ]
    rows = _Rows(mixture, functions, order, config, batch_size, host, hosts)
    # Captions become tokens while the device is fed with the batch before.
    ahead = Prefetch(
        rows.batches(), lambda taken: _with_tokens(taken, context_length, rows.faults), depth=1
    )
    try:
        yield from ahead
    finally:
        ahead.close()
        rows.faults.settle()


class _Rows:
    """The rows of this host's streams, batch by batch."""

    def __init__(
        self,
        mixture: Mixture,
        functions: list[RowFunction],
        order: Order,
        config: ConfigDict,
        batch_size: int,
        host: int,
        hosts: int,
    ):
        self._weights = mixture.weights
        self._image_shape = functions[0].image_shape
        self._order = order
        self.faults = Faults(config.data.max_bad)
        self._rows = order.rows_per_stream(batch_size)
        self._streams = order.own_streams(host, hosts)
        readers = len(mixture.sources) * len(self._streams)
        self._cores = usable_cores()
        parallel = -(-max(2 * self._cores, _IN_WORK) // readers) + 1
        self._readers = [
            Reader(
                Stream(
                    source,
                    (number, stream, order.streams),
                    order.seed,
                    order.window,
                    order.places[number][stream],
                    self.faults,
                ),
                functions[number],
                parallel,
                self._rows,
                self.faults,
            )
            for number, source in enumerate(mixture.sources)
            for stream in self._streams
        ]

    def _turns(self) -> Iterator[np.ndarray]:
        """For each row of a batch the reader whose turn it is, batch after batch."""
        order, count = self._order, len(self._streams)
        while True:
            yield np.concatenate(
                [
                    order.turns(stream, self._rows, self._weights) * count + own
                    for own, stream in enumerate(self._streams)
                ]
            )
            order = dataclasses.replace(order, rows=order.rows + self._rows)

    def batches(self) -> Iterator[tuple[dict[str, np.ndarray], list[str], Order]]:
        """Rows, their captions, and the order after them."""
        turns = tf.data.Dataset.from_generator(
            self._turns, output_signature=tf.TensorSpec([None], tf.int64)
        ).unbatch()
        rows = tf.data.Dataset.choose_from_datasets(
            [reader.dataset() for reader in self._readers], turns
        )
        # Pads while it copies a picture into the batch: padding first took as long as decoding.
        shapes = {name: spec.shape for name, spec in rows.element_spec.items()}
        rows = rows.padded_batch(
            self._rows * len(self._streams),
            shapes | {"image": self._image_shape},
            drop_remainder=True,
        ).prefetch(2)
        # A thread that waits for storage computes nothing: as many more as may wait.
        options = pipeline_options(self._cores + len(self._readers))
        iterator = rows.with_options(options).as_numpy_iterator()
        for turn, batch in zip(self._turns(), iterator, strict=False):
            tickets = batch.pop("ticket")
            captions = [
                self._repaired(caption, self._readers[reader], ticket)
                for caption, reader, ticket in zip(
                    batch.pop("caption"), turn, tickets.tolist(), strict=True
                )
            ]
            for number, reader in enumerate(self._readers):
                reader.deliver(tickets[turn == number])
            self._order = self._after_batch()
            yield batch, captions, self._order
        for reader in self._readers:
            if reader.failure is not None:
                raise reader.failure

    def _after_batch(self) -> Order:
        places = [list(places) for places in self._order.places]
        count = len(self._streams)
        for number, reader in enumerate(self._readers):
            places[number // count][self._streams[number % count]] = reader.place
        rows = self._order.rows + self._rows
        return dataclasses.replace(self._order, rows=rows, places=tuple(map(tuple, places)))

    def _repaired(self, caption: bytes, reader: Reader, ticket: int) -> str:
        """The caption as text; what had to be mended is counted."""
        text, fault = caption_text(caption)
        if fault is not None:
            self.faults.report(*reader.name(ticket), fault)
        return text


def _with_tokens(taken: Any, context_length: int, faults: Faults) -> TrainBatch:
    rows, captions, order = taken
    tokens = tokenize(captions, context_length, truncate=True)
    return TrainBatch(Batch(rows["image"], tokens, rows.get("box")), order, faults)
