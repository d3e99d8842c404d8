"""How the tf.data pipelines run."""

import os

import tensorflow as tf


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
