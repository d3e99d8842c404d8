"""Compiles a config's train step for a topology, and reads the report out of the result."""

import time
from pathlib import Path

from ml_collections import ConfigDict

from clip_jax.aot.advice import smallest_change
from clip_jax.aot.cost import collectives, matmul_flops, memory_traffic
from clip_jax.aot.hlo import parse
from clip_jax.aot.memory import largest_arrays, memory_of, sizes_in, usable_bytes
from clip_jax.aot.report import Report, bounds, exchanges
from clip_jax.aot.topology import get_topology
from clip_jax.errors import OutOfMemoryError
from clip_jax.models.transformer import AUTO_REMATS
from clip_jax.sharding import make_mesh
from clip_jax.training.program import cheapest_that_fits, make_program, peak_bytes


def report_on(
    config: ConfigDict,
    topology_name: str,
    *,
    recipe: str = "",
    advise: bool = True,
    hlo: Path | None = None,
) -> Report:
    """Compiles the step that training would run.

    Args:
        config: see `clip_jax.config.default_config`.
        topology_name: see `topology.get_topology`.
        recipe: the config's file, for the report.
        advise: look for the smallest change where it does not fit.
        hlo: a file for the compiled step's text.

    Raises:
        ConfigError: settings that cannot work on this topology, or no such topology.
    """
    topology = get_topology(topology_name)
    mesh = make_mesh(config.mesh, topology.devices)
    limit = usable_bytes(topology.devices[0])
    start = time.perf_counter()
    remat = config.train.remat
    try:
        if remat == "auto":
            program, compiled = cheapest_that_fits(config, mesh)
        else:
            program = make_program(config, mesh)
            compiled = program.compile()
        refused = None
    except OutOfMemoryError as error:
        program = make_program(config, mesh, AUTO_REMATS[-1] if remat == "auto" else remat)
        refused = str(error)
    common = {
        "config": recipe,
        "model": config.model.name,
        "topology": topology,
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "batch_size": config.train.batch_size,
        "accumulate": config.train.accumulate,
        "remat": program.remat,
        "limit": limit,
        "compile_seconds": time.perf_counter() - start,
    }
    if refused is not None:
        return Report(
            **common,
            peak=sizes_in(refused)[0],
            largest_arrays=tuple(map(str, largest_arrays(program))),
            change=smallest_change(config, topology, program.remat) if advise else None,
        )
    text = compiled.as_text() or ""
    if hlo is not None:
        hlo.write_text(text)
    module, devices = parse(text), list(mesh.devices.flat)
    sent, flops, traffic = (
        collectives(module, dict(mesh.shape), topology.slices),
        matmul_flops(module),
        memory_traffic(module),
    )
    return Report(
        **common,
        peak=peak_bytes(program, compiled),
        memory=memory_of(program, compiled, module),
        model_flops=program.flops * config.train.batch_size // mesh.size,
        matmul_flops=flops,
        traffic=traffic,
        exchanges=exchanges(sent, devices),
        bounds=bounds(topology, devices, flops, traffic, sent),
        steps=config.train.steps,
    )
