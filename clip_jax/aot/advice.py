"""The smallest change of a config that makes its step fit: tried, not guessed."""

from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax.aot.topology import Topology
from clip_jax.errors import ConfigError, OutOfMemoryError
from clip_jax.models.transformer import AUTO_REMATS
from clip_jax.sharding import make_mesh
from clip_jax.training.program import make_program

_ACCUMULATE = (2, 4, 8, 16)
_FSDP = (2, 4, 8, 16)


def smallest_change(config: ConfigDict, topology: Topology, remat: str) -> str:
    """Compiles one change after the other until one fits, those that cost least first.

    That is the order: recompute more; share out parameters and optimizer; compute the batch in
    parts, with the remat that recomputes most. What does not fit is refused within seconds.

    Args:
        config: which does not fit.
        topology: to compile for.
        remat: the config's, resolved if it is "auto".
    """
    for changes in _changes(remat, config):
        changed = config.copy_and_resolve_references()
        changed.unlock()
        for key, value in changes.items():
            section, _, name = key.partition(".")
            changed[section][name] = value
        try:
            mesh: Mesh = make_mesh(changed.mesh, topology.devices)
            make_program(changed, mesh).compile()
        except (ConfigError, OutOfMemoryError):
            continue
        return " ".join(f"--config.{key}={value}" for key, value in changes.items())
    return (
        "none of remat, fsdp and accumulation up to 16; take more chips, or chips with more memory"
    )


def _changes(remat: str, config: ConfigDict) -> Iterator[dict[str, Any]]:
    tried = [*AUTO_REMATS].index(remat) + 1 if remat in AUTO_REMATS else 0
    yield from ({"train.remat": each} for each in AUTO_REMATS[tried:])
    rest = {"train.remat": AUTO_REMATS[-1]}
    yield from (rest | {"mesh.fsdp": each} for each in _FSDP if each > config.mesh.fsdp)
    yield from (
        rest | {"train.accumulate": each} for each in _ACCUMULATE if each > config.train.accumulate
    )
