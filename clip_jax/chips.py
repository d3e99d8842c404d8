"""One table of accelerators: the published peaks that speed and memory are judged by.

Sources: Google's documentation of each TPU version, NVIDIA's data sheets (dense, not sparse,
FLOP/s). Interconnect is what one chip can send, in one direction, over one link.
"""

import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
        name: as it is commonly called, such as "v5e".
        device_kind: pattern of what JAX calls it (`jax.Device.device_kind`).
        peak_flops: bfloat16 FLOP/s of the matrix units.
        memory: HBM, in bytes; what the runtime keeps for itself is not subtracted.
        memory_bandwidth: of the HBM, in bytes/s.
        links: ports to other chips; a 2D torus has 4, a 3D torus 6; of a GPU, NVLink as one.
        link_bandwidth: bytes/s that one link carries in one direction.
        network_bandwidth: bytes/s of the data-centre network for each chip of a full slice, in one
            direction: what its host's cards carry, shared out.
    """

    name: str
    device_kind: str
    peak_flops: float
    memory: int
    memory_bandwidth: float
    links: int
    link_bandwidth: float
    network_bandwidth: float


GB = 2**30

CHIPS: tuple[Chip, ...] = (
    Chip("v4", r"TPU v4$", 275e12, 32 * GB, 1228e9, 6, 50e9, 6.25e9),
    Chip("v5e", r"TPU v5( lite|e)$", 197e12, 16 * GB, 819e9, 4, 50e9, 3.125e9),
    Chip("v5p", r"TPU v5p?$", 459e12, 95 * GB, 2765e9, 6, 100e9, 6.25e9),
    Chip("v6e", r"TPU v6( lite|e)$", 918e12, 32 * GB, 1640e9, 4, 100e9, 12.5e9),
    Chip("A100", r"A100.*80GB", 312e12, 80 * GB, 2039e9, 1, 300e9, 25e9),
    Chip("A100-40GB", r"A100", 312e12, 40 * GB, 1555e9, 1, 300e9, 25e9),
    Chip("H100", r"H100", 989e12, 80 * GB, 3350e9, 1, 450e9, 50e9),
    Chip("H200", r"H200", 989e12, 141 * GB, 4800e9, 1, 450e9, 50e9),
)


def chip_of(device: Any) -> Chip | None:
    """The chip that a `jax.Device` is; None for a CPU, and for what the table does not know."""
    return next((chip for chip in CHIPS if re.search(chip.device_kind, device.device_kind)), None)
