"""Random numbers that are a pure function of integers, whatever the library versions."""

from typing import Any

import numpy as np
from jaxtyping import Float32, UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hashed(*numbers: Any) -> UInt64[np.ndarray, "*n"]:
    """Mixes integers, or arrays of them that broadcast, into 64 bits: SplitMix64, chained."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for number in numbers:
            state = _mix(state + _GOLDEN + np.asarray(number).astype(np.uint64))
    return np.asarray(state)


def uniforms(count: int, *numbers: Any) -> Float32[np.ndarray, "*n count"]:
    """`count` draws from [0, 1), in steps of 2^-24, for each of the (broadcast) numbers."""
    state = hashed(*numbers)
    with np.errstate(over="ignore"):
        state = _mix(state[..., None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))
    return (state >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)


def permutation(length: int, *numbers: Any) -> np.ndarray:
    """A random order of range(length), int64."""
    return np.argsort(hashed(*numbers, np.arange(length)), kind="stable")


def _mix(state: Any) -> Any:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
