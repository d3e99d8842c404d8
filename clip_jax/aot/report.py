"""What is known of a step from its compilation alone, as numbers and as a page of text."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from clip_jax.aot.cost import Collective
from clip_jax.aot.memory import Memory
from clip_jax.aot.topology import Topology


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds that a step takes at least: no part of a chip is faster than its published peak.

    Attributes:
        matrix_units: all products of the compiled step, recomputation included.
        memory: all traffic with the HBM.
        interconnect: what each chip must send, over the links of the torus axes that it goes along;
            or over the data-centre network, if that takes longer.
    """

    matrix_units: float
    memory: float
    interconnect: float

    @property
    def step(self) -> float:
        """With everything perfectly overlapped."""
        return max(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind along the same axes, together.

    Attributes:
        kind: as HLO calls it.
        axes: of the mesh.
        network: they cross the data-centre network between slices.
        count: in the program.
        runs: a step.
        bytes: of the arrays, all runs of a step.
        sent: bytes that each chip must send in a step.
        asynchronous: how many of `count` run beside other work.
    """

    kind: str
    axes: tuple[str, ...]
    network: bool
    count: int
    runs: int
    bytes: int
    sent: float
    asynchronous: int


def exchanges(collectives: Sequence[Collective], devices: Sequence[Any]) -> tuple[Exchange, ...]:
    """Collectives grouped by kind and axes; `devices` are the mesh's, flat."""
    groups: dict[Any, list[Collective]] = {}
    for each in collectives:
        network = _slices(each, devices) > 1
        groups.setdefault((each.kind, each.axes, network), []).append(each)
    return tuple(
        Exchange(
            kind,
            axes,
            network,
            count=len(found),
            runs=sum(each.times for each in found),
            bytes=sum(each.bytes * each.times for each in found),
            sent=sum(each.sent for each in found),
            asynchronous=sum(each.asynchronous for each in found),
        )
        for (kind, axes, network), found in groups.items()
    )


def bounds(
    topology: Topology,
    devices: Sequence[Any],
    matmul_flops: int,
    traffic: int,
    collectives: Sequence[Collective],
) -> Bounds:
    """The three lower bounds; `devices` are the mesh's, flat."""
    chip = topology.chip
    links = network = 0.0
    for each in collectives:
        slices = _slices(each, devices)
        inside = each.group // slices
        # Between slices each chip exchanges the share that it holds of its slice's array.
        network += each.sent_among(slices) / inside
        links += each.sent_among(inside) / (_links(each, topology, devices) * chip.link_bandwidth)
    return Bounds(
        matmul_flops / chip.peak_flops,
        traffic / chip.memory_bandwidth,
        max(links, network / chip.network_bandwidth),
    )


def _slices(collective: Collective, devices: Sequence[Any]) -> int:
    return len({getattr(devices[number], "slice_index", 0) for number in collective.members})


def _links(collective: Collective, topology: Topology, devices: Sequence[Any]) -> int:
    """Links of a chip along the axes of the torus in which the group's chips differ."""
    positions = np.array([devices[number].coords for number in collective.members])
    varying = int((positions != positions[:1]).any(axis=0).sum())
    return min(2 * max(varying, 1), topology.chip.links)


@dataclasses.dataclass(frozen=True)
class Report:
    """One config on one topology; `to_dict` is what `--json` writes."""

    config: str
    model: str
    topology: Topology
    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    remat: str
    limit: int  # bytes that a program may take of a chip's memory
    peak: int
    compile_seconds: float
    memory: Memory | None = None  # None where it does not fit, and all that follows
    model_flops: int = 0  # of a step, for each chip
    matmul_flops: int = 0
    traffic: int = 0
    exchanges: tuple[Exchange, ...] = ()
    bounds: Bounds | None = None
    steps: int = 0
    largest_arrays: tuple[str, ...] = ()
    change: str | None = None  # the smallest that fits

    @property
    def fits(self) -> bool:
        """It compiles, so it fits."""
        return self.memory is not None

    @property
    def recompute_ratio(self) -> float:
        """Operations of the compiled step's products over the model's."""
        return self.matmul_flops / self.model_flops

    @property
    def mfu_bound(self) -> float:
        """The highest model FLOPs utilisation that the three bounds allow."""
        assert self.bounds is not None
        return self.model_flops / self.topology.chip.peak_flops / self.bounds.step

    def to_dict(self) -> dict[str, Any]:
        """Plain data; docs/pods.md says what each key means."""
        chips = len(self.topology.devices)
        found: dict[str, Any] = {
            "config": self.config,
            "model": self.model,
            "topology": self.topology.name,
            "chip": self.topology.chip.name,
            "chips": chips,
            "slices": self.topology.slices,
            "mesh": self.mesh,
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "remat": self.remat,
            "fits": self.fits,
            "peak_bytes_per_chip": self.peak,
            "limit_bytes_per_chip": self.limit,
            "compile_seconds": round(self.compile_seconds, 1),
        }
        if self.memory is None or self.bounds is None:
            return found | {
                "largest_arrays": list(self.largest_arrays),
                "smallest_change": self.change,
            }
        seconds = self.bounds.step
        return found | {
            "memory_bytes_per_chip": dataclasses.asdict(self.memory),
            "model_flops_per_chip": self.model_flops,
            "matmul_flops_per_chip": self.matmul_flops,
            "recompute_ratio": self.recompute_ratio,
            "memory_traffic_bytes_per_chip": self.traffic,
            "collectives": [
                dataclasses.asdict(each) | {"axes": list(each.axes)} for each in self.exchanges
            ],
            "bound_seconds": dataclasses.asdict(self.bounds),
            "mfu_bound": self.mfu_bound,
            "examples_per_second_per_chip_bound": self.batch_size / seconds / chips,
            "steps": self.steps,
            "hours_bound": self.steps * seconds / 3600,
            "chip_hours_bound": self.steps * seconds / 3600 * chips,
        }

    def to_text(self) -> str:
        """For the terminal."""
        shape = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1)
        chips = len(self.topology.devices)
        head = (
            f"{self.model} on {self.topology.name}: {chips} chips ({shape}), batch "
            f"{self.batch_size:,}, remat {self.remat}"
            + (f", {self.accumulate} microbatches" if self.accumulate > 1 else "")
        )
        return "\n".join([head, *(self._lines() if self.fits else self._refusal())])

    def _refusal(self) -> list[str]:
        lines = [
            f"  does not fit: {_gb(self.peak)} of {_gb(self.limit)} a chip, "
            f"{_gb(self.peak - self.limit)} too much",
            "  largest arrays:",
            *(f"    {array}" for array in self.largest_arrays),
        ]
        if self.change:
            lines.append(f"  smallest change that fits: {self.change}")
        return lines

    def _lines(self) -> list[str]:
        assert self.memory is not None
        assert self.bounds is not None
        parts = ", ".join(
            f"{name} {_gb(size)}" for name, size in dataclasses.asdict(self.memory).items() if size
        )
        bound, seconds = self.bounds, self.bounds.step
        chips, hours = len(self.topology.devices), self.steps * seconds / 3600
        return [
            f"  fits: {_gb(self.peak)} of {_gb(self.limit)} a chip, {_gb(self.limit - self.peak)} "
            "free",
            f"    {parts}",
            f"  compiled in {self.compile_seconds:.0f} s",
            f"  matrix products: {self.recompute_ratio:.3f} times the model's own operations",
            "  collectives a step:" if self.exchanges else "  no collectives",
            *(
                f"    {each.kind} along {' and '.join(each.axes)}"
                f"{' between slices' if each.network else ''}: {each.runs} "
                f"({each.asynchronous} of {each.count} beside other work), {_gb(each.bytes)}, "
                f"{_gb(each.sent)} sent"
                for each in self.exchanges
            ),
            f"  a step takes at least {1e3 * seconds:.1f} ms: matrix units "
            f"{1e3 * bound.matrix_units:.1f}, HBM {1e3 * bound.memory:.1f} "
            f"({_gb(self.traffic)}), interconnect {1e3 * bound.interconnect:.1f}",
            f"  hence MFU at most {self.mfu_bound:.1%}, "
            f"{self.batch_size / seconds / chips:,.0f} examples/s/chip; {self.steps:,} steps take "
            f"at least {hours:,.1f} h, {hours * chips:,.0f} chip-hours",
        ]


def _gb(size: int | float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"
