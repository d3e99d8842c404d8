"""What the pipelines ask of the C library."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Page faults of a block of 50 MB, written and freed, and of the next one.
PROGRAM = """
import ctypes, resource
from clip_jax.data.pipeline import keep_freed_memory
{before}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
for _ in range(2):
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(50 << 20)
    libc.memset(block, 1, 50 << 20)
    libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""


def faults(before):
    program = PROGRAM.format(before=before)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [int(line) for line in done.stdout.splitlines()[-2:]]


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt"
)
def test_memory_that_was_freed_is_used_again():
    first, second = faults("keep_freed_memory()")
    assert second < first / 10
    first, second = faults("")
    assert second > first / 2  # what it is for
