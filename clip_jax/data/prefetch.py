"""An iterator that runs ahead in a thread of its own."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


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
