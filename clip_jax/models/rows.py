"""Where the rows of a batch lie, which a model that is being traced for training can ask.

And how activations lie in memory, where a compiler would choose badly.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array


class Rows(NamedTuple):
    """Where the rows of a batch lie; see `rows_lie`."""

    devices: int
    sharding: Callable[[int], Any] | None


_rows: contextvars.ContextVar[Rows | None] = contextvars.ContextVar("rows", default=None)


@contextlib.contextmanager
def rows_lie(devices: int = 1, sharding: Callable[[int], Any] | None = None) -> Iterator[None]:
    """While a model is traced: tells it where the rows of its activations are, and to keep them so.

    Knowing that, attention goes through them in groups. Without the sharding, a partitioner that
    places parameters that are split, too, might rather split the features, and gather the rows of
    the whole batch.

    Args:
        devices: that share out the rows of an array, as it is traced: 1 inside `jax.shard_map`.
        sharding: of an array of so many axes, the first of which are the rows; None: they are one
            device's own.
    """
    token = _rows.set(Rows(devices, sharding))
    try:
        yield
    finally:
        _rows.reset(token)


def where_rows_lie() -> Rows | None:
    """What `rows_lie` said, or None where nothing did."""
    return _rows.get()


def rows_at_once(rows: int, most: int) -> int:
    """The size of groups of an array's rows that have at most `most` of each device's own, or one.

    They are equal, and as large as that allows. Where a group takes every so many-th row, each
    device has its share of every group. Rows that `rows_lie` did not place are one device's.
    """
    placed = _rows.get()
    devices = placed.devices if placed else 1
    own, uneven = divmod(rows, devices)
    if uneven:
        return rows
    return devices * next((n for n in range(min(own, most), 1, -1) if own % n == 0), 1)


def keep_rows(x: Array) -> Array:
    """Marks activations, whose leading axis is the rows, with the sharding of `rows_lie`."""
    rows = _rows.get()
    if rows is None or rows.sharding is None:
        return x
    return jax.lax.with_sharding_constraint(x, rows.sharding(x.ndim))


def features_minor(x: Array) -> Array:
    """Activations whose features, the last axis, lie next to each other on a GPU.

    A product with few rows, such as the loss's, is fastest with the rows there. From one token of
    each row the compiler would carry that over to all tokens in all blocks, and then transpose
    before and after every product.
    """
    layout = Layout(tuple(range(x.ndim)))
    return jax.lax.platform_dependent(
        x, cuda=lambda x: with_layout_constraint(x, layout), default=lambda x: x
    )
