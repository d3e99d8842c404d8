"""How the tf.data pipelines run."""

import ctypes
import os

import tensorflow as tf

# Parameters of mallopt in glibc's malloc.h, and what they are set to.
_MALLOC = {
    -4: 0,  # M_MMAP_MAX: no block is mapped by itself, to be given back when it is freed
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: the heap keeps up to 2 GB that nobody uses
    -2: 2**26,  # M_TOP_PAD: it grows by 64 MB at a time
}


def keep_freed_memory() -> None:
    """Has this process use memory again that was freed, where the C library is glibc.

    A batch of pictures is large enough for glibc to ask the system for new memory each time, which
    is touched page by page and cleared: a quarter of all the time that a picture took, and of a
    train step on a CPU a tenth.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _MALLOC.items():
            mallopt(parameter, value)


def usable_cores() -> int:
    """Of this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pipeline_options(threads: int | None = None) -> tf.data.Options:
    """Threads of its own, or, with None, those that all pipelines share; and no autotuning.

    Every pipeline here states its parallelism. What autotuning would add is a thread, which
    TensorFlow can miss at the end: an iterator that is dropped before that thread has gone to sleep
    waits until it wakes up, for as long as a minute (TensorFlow 2.21).
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    if threads is not None:
        options.threading.private_threadpool_size = threads
    return options
