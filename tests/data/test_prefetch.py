"""Prefetch: an iterator that runs ahead."""

import itertools
import threading
import time

import pytest

from clip_jax.data.prefetch import Prefetch
from clip_jax.errors import DataError


def endless(threads):
    for n in itertools.count():
        threads.add(threading.current_thread())
        yield n


def test_prefetch_keeps_the_order_and_applies_put():
    prefetch = Prefetch(iter(range(50)), lambda n: 10 * n)
    assert list(prefetch) == list(range(0, 500, 10))


def test_prefetch_is_over_when_it_is_over():
    prefetch = Prefetch(iter([1]), lambda n: n)
    assert list(prefetch) == [1]
    assert list(prefetch) == []


@pytest.mark.parametrize("where", ["items", "put"])
def test_an_exception_comes_out_where_the_item_would_have(where):
    def items():
        yield from range(3)
        if where == "items":
            raise DataError("shard 7 is damaged")
        yield 3

    def put(n):
        if n == 3:
            raise DataError("shard 7 is damaged")
        return n

    prefetch = Prefetch(items(), put)
    assert [next(prefetch) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="shard 7 is damaged"):
        next(prefetch)
    with pytest.raises(StopIteration):
        next(prefetch)


def test_close_ends_the_thread_though_the_queue_is_full():
    threads = set()
    prefetch = Prefetch(endless(threads), lambda n: n, depth=2)
    assert next(prefetch) == 0
    (thread,) = threads
    time.sleep(0.3)  # the queue is full by now, and the thread wants to put another one
    assert thread.is_alive()
    prefetch.close()
    assert not thread.is_alive()
    with pytest.raises(StopIteration):
        next(prefetch)


def test_prefetch_runs_no_more_than_its_depth_ahead():
    made = []

    def put(n):
        made.append(n)
        return n

    prefetch = Prefetch(itertools.count(), put, depth=3)
    time.sleep(0.3)
    assert made == [0, 1, 2, 3]  # three in the queue and one in hand
    prefetch.close()


def test_waited_is_the_time_that_the_consumer_was_blocked():
    made = []

    def slowly(n):
        time.sleep(0.1)
        made.append(n)
        return n

    slow = Prefetch(iter(range(6)), slowly)
    assert list(slow) == list(range(6))
    assert slow.waited > 0.5

    made.clear()
    fast = Prefetch(iter(range(6)), slowly, depth=6)
    while len(made) < 6:  # a consumer that has other things to do
        time.sleep(0.01)
    assert list(fast) == list(range(6))
    assert fast.waited < slow.waited / 2
