"""What a compiled step keeps in a chip's memory, and what is largest where it does not fit."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import source_info_util

from clip_jax.aot.hlo import Computation, Instruction, Module, Shape
from clip_jax.optim import path_name
from clip_jax.sharding import batch_divisor
from clip_jax.training.program import Program, peak_bytes


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip's memory at the peak; the parts add up to it.

    Attributes:
        parameters: BatchNorm's running statistics included.
        averages: the averaged weights (`optim.ema_decay`).
        optimizer: moments and counters.
        batch: pixels and tokens.
        activations: what the forward pass leaves for the backward pass.
        temporaries: all else: gradients, buffers of one layer, the program, and what is padded.
    """

    parameters: int
    averages: int
    optimizer: int
    batch: int
    activations: int
    temporaries: int

    @property
    def peak(self) -> int:
        """Their sum."""
        return sum(dataclasses.astuple(self))


def memory_of(program: Program, compiled: jax.stages.Compiled, module: Module) -> Memory:
    """Splits the peak that the compiler reports."""
    state = program.target
    parts = {
        "parameters": _held((state.params, state.batch_stats)),
        "averages": _held(state.ema),
        "optimizer": _held((state.opt_state, state.step)),
        "batch": _held(program.batch),
        "activations": activation_bytes(module),
    }
    return Memory(**parts, temporaries=peak_bytes(program, compiled) - sum(parts.values()))


# Before memory is assigned, and after: what fragmentation takes shows only then.
_MESSAGE = re.compile(
    r"(?:\(|Used )([\d.]+)([KMGT])(?:\) exceeds available HBM \(| of )([\d.]+)([KMGT])"
)


def sizes_in(message: str) -> tuple[int, int]:
    """(bytes needed, bytes that there are), of the compiler's message that memory is exhausted.

    Raises:
        ValueError: it says neither.
    """
    found = _MESSAGE.search(message)
    if found is None:
        raise ValueError(f"no sizes in the compiler's message: {message}")
    units = {unit: 2 ** (10 * power) for power, unit in enumerate("KMGT", start=1)}
    needed, unit, limit, limit_unit = found.groups()
    return int(float(needed) * units[unit]), int(float(limit) * units[limit_unit])


def usable_bytes(device: jax.Device) -> int:
    """What a program may take of a device's memory: the compiler says so when it refuses one."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    too_large = jax.ShapeDtypeStruct((2**42,), jnp.int8, sharding=sharding)
    try:
        jax.jit(jnp.negative).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        return sizes_in(str(error))[1]
    raise ValueError(f"{device.device_kind} seems to hold an array of 4 TB")


def _held(tree: Any) -> int:
    """Bytes that each device holds of a tree of abstract arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


# ----------------------------------------------------------------------------- activations

_PASSED_ON = ("get-tuple-element", "bitcast", "copy", "copy-start", "copy-done", "tuple")


def activation_bytes(module: Module) -> int:
    """Arrays in main memory that the forward pass makes and the backward pass takes.

    They are told apart by the names that JAX gives its operations: those of a forward pass lie in a
    `jvp`, those of a backward pass in the `transpose` of one. Of several microbatches those count
    that are there at once: the text of a module is its schedule.
    """
    return _most_saved(module, module.computations[module.entry])


def _most_saved(module: Module, computation: Computation) -> int:
    """The most bytes at once, of what the computation saves and what its loops do."""
    position = {name: number for number, name in enumerate(computation)}
    change = [0] * (len(computation) + 1)
    for (source, _), (shape, last) in _saved(module, computation).items():
        change[position[source]] += shape.bytes
        change[position[last] + 1] -= shape.bytes
    most = live = 0
    for instruction, difference in zip(computation.values(), change, strict=False):
        live += difference
        inside = (
            _most_saved(module, module.computations[name])
            for names in instruction.called.values()
            for name in names
            if name in module.computations and name not in module.fused
        )
        most = max(most, live + max(inside, default=0))
    return most


def _saved(module: Module, computation: Computation) -> dict[tuple[str, int], tuple[Shape, str]]:
    """(instruction, element of its result) -> its shape, and the last instruction that takes it."""
    saved: dict[tuple[str, int], tuple[Shape, str]] = {}
    for user in computation.values():
        if _is_backward(user) and user.opcode not in _PASSED_ON:
            for operand in user.operands:
                for source, index in _sources(module, computation, operand):
                    shape = source.shapes[index]
                    if _is_forward(source) and shape.memory_space == 0:
                        saved[source.name, index] = shape, user.name
    return saved


def _sources(
    module: Module, computation: Computation, name: str, element: int | None = None
) -> Iterator[tuple[Instruction, int]]:
    """Where a value, or all elements of a tuple, are made: (instruction, element of its result)."""
    instruction = computation.get(name)
    if instruction is None:
        return
    if instruction.opcode == "tuple":
        chosen = instruction.operands if element is None else [instruction.operands[element]]
        for operand in chosen:
            yield from _sources(module, computation, operand)
    elif instruction.opcode == "get-tuple-element":
        (index,) = instruction.numbers("index")
        yield from _sources(module, computation, instruction.operands[0], index)
    elif instruction.opcode in _PASSED_ON:
        yield from _sources(module, computation, instruction.operands[0])
    elif instruction.opcode == "while":
        elements = range(len(instruction.shapes)) if element is None else [element]
        for each in elements:
            if _unchanged(module, instruction, each):
                yield from _sources(module, computation, instruction.operands[0], each)
            else:
                yield instruction, each
    else:
        elements = range(len(instruction.shapes)) if element is None else [element]
        yield from ((instruction, each) for each in elements)


def _unchanged(module: Module, loop: Instruction, element: int) -> bool:
    """The loop hands an element of its state on as it is."""
    body = module.computations[loop.called["body"][0]]
    root = next(each for each in body.values() if each.root)
    if root.opcode != "tuple":
        return False
    result = body[root.operands[element]]
    return (
        result.opcode == "get-tuple-element"
        and result.numbers("index") == (element,)
        and body[result.operands[0]].opcode == "parameter"
    )


def _is_backward(instruction: Instruction) -> bool:
    return "transpose(jvp(" in instruction.attributes


def _is_forward(instruction: Instruction) -> bool:
    return "jvp(" in instruction.attributes and not _is_backward(instruction)


# ----------------------------------------------------------------------------- largest arrays


class Array(NamedTuple):
    """A large array of a program, a device's share of it."""

    bytes: int
    dtype: str
    shape: tuple[int, ...]
    origin: str

    def __str__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        return f"{self.bytes / 1e9:6.2f} GB  {self.dtype}[{shape}]  {self.origin}"


def largest_arrays(program: Program, count: int = 5) -> list[Array]:
    """The largest arrays that a step holds: of the train state, or kept by a loop over layers.

    Known from what JAX hands to the compiler; of each layer's results that a loop stacks, the line
    of the model that makes them.
    """
    found = [
        Array(_held(leaf), str(leaf.dtype), leaf.sharding.shard_shape(leaf.shape), path_name(path))
        for path, leaf in jax.tree_util.tree_leaves_with_path(program.target._asdict())
    ]
    jaxpr = program.step.trace(program.target, program.batch).jaxpr.jaxpr
    found += _stacked(jaxpr, batch_divisor(program.mesh))
    return sorted(found, key=lambda array: -array.bytes)[:count]


def _stacked(jaxpr: Any, devices: int) -> Iterator[Array]:
    """What the scans stack; outside `shard_map` shapes are global, of which devices share rows."""
    for equation in jaxpr.eqns:
        inner = [value for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")
        ) if hasattr(value, "eqns") or hasattr(value, "jaxpr")]  # fmt: skip
        if equation.primitive.name == "scan":
            body = equation.params["jaxpr"].jaxpr
            makers = {out: made for made in body.eqns for out in made.outvars}
            for result, stacked in zip(body.outvars, equation.outvars, strict=True):
                if stacked.aval.ndim == result.aval.ndim:
                    continue  # carried on, not stacked
                kind = stacked.aval
                maker = makers.get(result)
                origin = (
                    source_info_util.summarize(maker.source_info) if maker else "what a layer takes"
                )
                size = kind.size * kind.dtype.itemsize // devices
                yield Array(size, str(kind.dtype), kind.shape, origin)
        for each in inner:
            shared = 1 if equation.primitive.name == "shard_map" else devices
            yield from _stacked(getattr(each, "jaxpr", each), shared)
