"""The devices of a TPU slice that is not there, as the TPU compiler knows them."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from clip_jax.chips import CHIPS, Chip, chip_of
from clip_jax.errors import ConfigError

# A v4 or v5p chip has two cores that act as one.
_VERSIONS = {
    "v4": ("8x8x4", {"chip_config_name": "megacore"}),
    "v5e": ("16x16", {}),
    "v5p": ("8x8x8", {}),
    "v6e": ("16x16", {}),
}
# Else libtpu asks Google's cloud what machine this is, complains that it is none of its TPUs, and
# lets one process load it at a time.
_COMPILER_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Topology(NamedTuple):
    """Slices of TPUs of one version.

    Attributes:
        name: such as "v5e:16x16", or "v5e:16x16*2" for two slices.
        chip: its published figures.
        devices: each stands for a chip.
        slices: joined by the data-centre network.
    """

    name: str
    chip: Chip
    devices: Sequence[Any]
    slices: int


def leave_devices_alone() -> None:
    """Keeps JAX on the CPU, unless JAX_PLATFORMS says otherwise: the compiler needs no TPU."""
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")


def get_topology(name: str) -> Topology:
    """Asks the TPU compiler for a topology.

    Args:
        name: VERSION:SHAPE, and *SLICES where there are several.

    Raises:
        ConfigError: a name that says nothing, a shape that the compiler does not know, or no
            compiler (the package libtpu).
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})(?:\*(\d+))?", name)
    if match is None or match[1] not in _VERSIONS:
        raise ConfigError(f"topology {name!r}: expected {_examples()}")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "the TPU compiler is missing (the package libtpu); it needs no TPU: "
            "pip install 'clip-nnx[tpu]'"
        )
    for key, value in _COMPILER_ALONE.items():
        os.environ.setdefault(key, value)
    version, shape = match[1], match[2]
    slices = int(match[3] or 1)
    options: dict[str, Any] = dict(_VERSIONS[version][1])
    if slices > 1:
        options["num_slices"] = slices
    try:
        devices: Sequence[Any] = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{version}:{shape}", **options
        ).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"the TPU compiler refuses the topology {name!r} ({str(error).splitlines()[0]}); "
            f"expected {_examples()}"
        ) from error
    chip = chip_of(devices[0])
    if chip is None:
        raise ConfigError(
            f"topology {name!r} is of chips that JAX calls {devices[0].device_kind!r}, whose peaks "
            f"are not in clip_jax/chips.py; it has {', '.join(each.name for each in CHIPS)}"
        )
    return Topology(name, chip, devices, slices)


def _examples() -> str:
    known = ", ".join(f"{version}:{shape}" for version, (shape, _) in _VERSIONS.items())
    return (
        f"VERSION:SHAPE such as {known}, whose shape may be smaller or larger, or VERSION:SHAPE*N "
        "for N slices"
    )
