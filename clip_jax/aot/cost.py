"""What a run of a compiled module costs a device: matrix products, memory traffic, collectives."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from clip_jax.aot.hlo import Computation, Instruction, Module, Shape

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# ----------------------------------------------------------------------------- matrix products


def matmul_flops(module: Module) -> int:
    """Operations of all dots and convolutions, two a multiply-add, loops times their trips.

    Of a convolution, taps on padding count, as they do in a model's analytic operations and in the
    time that the matrix units take; taps on the holes of a dilated input do not.
    """
    total = 0
    for name, instruction, times in module.instructions():
        count = {"dot": _dot, "convolution": _convolution}.get(instruction.opcode)
        if count:
            total += times * count(instruction, module.computations[name])
    return total


def _dot(instruction: Instruction, computation: Computation) -> int:
    left = computation[instruction.operands[0]].shapes[0]
    contracted = math.prod(left.dims[axis] for axis in instruction.numbers("lhs_contracting_dims"))
    return 2 * instruction.shapes[0].size * contracted


def _convolution(instruction: Instruction, computation: Computation) -> int:
    left, kernel = (computation[name].shapes[0].dims for name in instruction.operands[:2])
    result = instruction.shapes[0].dims
    labels = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels") or "")
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {instruction.name}")
    from_left, from_kernel, to_result = labels.groups()
    count = result[to_result.index("b")] * result[to_result.index("f")]
    count *= kernel[from_kernel.index("i")]
    for axis, window in enumerate(_window(instruction)):
        label = str(axis)
        count *= _taps(left[from_left.index(label)], result[to_result.index(label)], *window)
    return 2 * count


def _window(instruction: Instruction) -> Iterator[tuple[int, int, int, int, int]]:
    """(size, stride, low padding, input dilation, kernel dilation) of each spatial dimension."""
    fields = dict(re.findall(r"(\w+)=([\w\-]+)", instruction.attribute("window") or ""))
    sizes = fields["size"].split("x") if "size" in fields else []

    def numbers(field: str, default: str) -> list[str]:
        return fields[field].split("x") if field in fields else [default] * len(sizes)

    yield from (
        (int(size), int(stride), int(pad.split("_")[0]), int(left), int(right))
        for size, stride, pad, left, right in zip(
            sizes,
            numbers("stride", "1"),
            numbers("pad", "0_0"),
            numbers("lhs_dilate", "1"),
            numbers("rhs_dilate", "1"),
            strict=True,
        )
    )


@functools.cache
def _taps(
    length: int, results: int, size: int, stride: int, padding: int, hole: int, spread: int
) -> int:
    """Pairs of a position in the result and a tap of the kernel that are multiplied.

    Solved, not enumerated: of products that a TPU writes as convolutions, both are as many as rows.
    """
    if hole == 1 and length > 1:
        return results * size
    place = np.arange(length) * hole + padding  # = result * stride + tap * spread
    common = math.gcd(stride, spread)
    period = spread // common  # from one result that solves it to the next
    first = place // common * pow(stride // common, -1, period) % period
    low = np.maximum(0, -(((size - 1) * spread - place) // stride))  # with the last tap
    high = np.minimum(results - 1, place // stride)
    counts = (high - first) // period - (low - 1 - first) // period
    return int(np.maximum(counts, 0)[place % common == 0].sum())


# ----------------------------------------------------------------------------- memory traffic

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "async-start", "async-update", "async-done",
    "copy-done", "slice-done", "all-reduce-done", "all-gather-done", "collective-permute-done",
    "opt-barrier", "add-dependency",
}  # fmt: skip
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast")  # of custom calls
_SLICES = ("dynamic-slice", "slice", "gather")
_HANDED_ON = {"parameter", "constant", "tuple", *_KINDS}  # within a fusion


def memory_traffic(module: Module) -> int:
    """Bytes that pass between a device's main memory and the chip.

    Each fusion (or instruction outside one) reads what it takes and writes what it gives; of an
    array of which it takes a slice only the slice, of one that it updates in place only the update.
    A fusion that a collective runs beside also hands on the collective's arrays, untouched.
    """
    total = 0
    for name, instruction, times in module.instructions():
        if name not in module.fused and instruction.opcode not in _FREE:
            total += times * _traffic(module, module.computations[name], instruction)
    return total


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    if (instruction.attribute("custom_call_target") or "").strip('"') in _FREE_TARGETS:
        return 0
    operands = [computation[name] for name in instruction.operands if name in computation]
    stored = [_in_memory(operand.shapes) for operand in operands]
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called["calls"][0]]
        parameters = {
            int(each.operands[0]): each for each in inner.values() if each.opcode == "parameter"
        }
        reads = sum(
            min(_read(module, inner, parameters[number]), size)
            for number, size in enumerate(stored)
            if size
        )
        return reads + min(_written(inner, _root(inner)), _in_memory(instruction.shapes))
    if instruction.opcode in _SLICES:
        return 2 * _in_memory(instruction.shapes)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * stored[1]
    if instruction.opcode in ("copy-start", "slice-start"):  # (target, source, context)
        target, source = instruction.shapes[:2]
        size = min(target.bytes, source.bytes)
        return size * ((target.memory_space == 0) + (source.memory_space == 0))
    return sum(stored) + _in_memory(instruction.shapes)


def _in_memory(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes if shape.memory_space == 0)


def _root(computation: Computation) -> Instruction:
    return next(each for each in computation.values() if each.root)


def _read(module: Module, computation: Computation, source: Instruction) -> int:
    """Bytes of a value that the computation needs."""
    total = 0
    for user in computation.values():
        for number, name in enumerate(user.operands):
            if name != source.name or user.opcode in _HANDED_ON:
                continue
            if user.opcode in _SLICES and number == 0:
                total += user.bytes
            elif user.opcode == "dynamic-update-slice" and number == 0:
                total += 0
            elif user.opcode == "bitcast":
                total += _read(module, computation, user)
            elif user.opcode == "fusion":
                inner = module.computations[user.called["calls"][0]]
                total += sum(
                    _read(module, inner, each)
                    for each in inner.values()
                    if each.opcode == "parameter" and int(each.operands[0]) == number
                )
            else:
                return source.bytes
    return min(total, source.bytes)


def _written(computation: Computation, result: Instruction) -> int:
    if result.opcode == "tuple":
        return sum(_written(computation, computation[name]) for name in result.operands)
    if result.opcode == "bitcast":
        return _written(computation, computation[result.operands[0]])
    if result.opcode == "dynamic-update-slice":
        return computation[result.operands[1]].bytes
    return 0 if result.opcode in ("parameter", *_KINDS) else result.bytes


# ----------------------------------------------------------------------------- collectives

# What the compiler hands to the runtime that joins slices, by its attribute.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
        kind: as HLO calls it, such as "all-reduce".
        axes: mesh axes along which the devices of a group differ.
        group: devices that take part.
        bytes: of the whole array, of one run: what an all-gather gives, what the others take.
        times: runs a step.
        asynchronous: the compiler split it, so that other work can be done meanwhile.
        members: the devices of one group, by their number in the mesh.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    bytes: int
    times: int
    asynchronous: bool
    members: tuple[int, ...]

    @property
    def sent(self) -> float:
        """Bytes that each device must send in a step, however it is done."""
        return self.sent_among(self.group)

    def sent_among(self, members: int) -> float:
        """Likewise, if so many devices took part."""
        total = float(self.bytes * self.times)
        if self.kind == "collective-permute":
            return total if members > 1 else 0.0
        return (2 if self.kind == "all-reduce" else 1) * total * (members - 1) / members


def collectives(
    module: Module, mesh_shape: Mapping[str, int], slices: int = 1
) -> tuple[Collective, ...]:
    """All collectives of more than one device, each once.

    What the TPU compiler runs beside other work is in the text several times, in each of the
    fusions that it is done beside; they have its chain's number, or at least its channel and name.
    What slices exchange over the network is written as sends and receives: each device exchanges
    with those that stand where it stands in the other slices.

    Args:
        module: compiled for the devices of a mesh, in its order.
        mesh_shape: axis name -> size, in the mesh's order.
        slices: of as many devices each, one after the other in the mesh's order.
    """
    found: dict[str, Collective] = {}
    for name, instruction, times in module.instructions():
        kind = instruction.opcode.removesuffix("-start")
        between = _BETWEEN_SLICES.search(instruction.attributes) if kind == "send" else None
        if between:
            found[instruction.name] = _between_slices(
                between[1], instruction.shapes[0].bytes, times, mesh_shape, slices
            )
        if kind not in _KINDS:
            continue
        groups = _groups(instruction, math.prod(mesh_shape.values()))
        if max(map(len, groups)) < 2:
            continue
        operands = [module.computations[name][each] for each in instruction.operands]
        taken = [shape for operand in operands for shape in operand.shapes]
        size, group = sum(shape.bytes for shape in taken), len(groups[0])
        if kind == "all-reduce":  # it may take bfloat16 and give float32
            size = max(size, instruction.bytes)
        collective = Collective(
            kind,
            _axes(groups, mesh_shape),
            group,
            size * group if kind == "all-gather" else size,
            times,
            instruction.opcode.endswith("-start") or name in module.fused,
            tuple(groups[0]),
        )
        same = _identity(name in module.fused, instruction)
        # Where it is done beside the turns of a loop, it is started once.
        if same not in found or collective.times < found[same].times:
            found[same] = collective
    return tuple(found.values())


def _between_slices(
    transfer: str, sent: int, times: int, mesh_shape: Mapping[str, int], slices: int
) -> Collective:
    kind = {"ONE_TO_ONE": "collective-permute"}.get(transfer, transfer.lower().replace("_", "-"))
    devices = math.prod(mesh_shape.values())
    group = list(range(0, devices, devices // slices))
    size = sent * slices if kind == "all-gather" else sent
    axes = _axes([group], mesh_shape)
    return Collective(kind, axes, slices, size, times, asynchronous=True, members=tuple(group))


def _identity(fused: bool, instruction: Instruction) -> str:
    if not fused:
        return instruction.name
    chain = re.search(r'chain_id="?(\w+)', instruction.attributes)
    channel, metadata = instruction.attribute("channel_id"), instruction.attribute("metadata")
    return f"chain {chain[1]}" if chain else f"channel {channel} {metadata} {instruction.shapes}"


def _groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """Devices that exchange with each other."""
    if instruction.opcode.startswith("collective-permute"):
        pairs = np.array(instruction.numbers("source_target_pairs")).reshape(-1, 2)
        return [[int(a), int(b)] for a, b in pairs if a != b] or [[0]]
    text = instruction.attribute("replica_groups") or "{}"
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, dims, order = map(_whole, iota.groups())
        return _iota(dims, order).reshape(shape).tolist()
    if text.startswith("mesh["):
        return _groups_of_mesh(instruction.attributes)
    groups = [
        [int(number) for number in re.findall(r"\d+", group)]
        for group in re.findall(r"\{([\d, ]+)\}", text)
    ]
    return groups or [list(range(devices))]


def _groups_of_mesh(attributes: str) -> list[list[int]]:
    """Of `replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}`: along these axes.

    Raises:
        ValueError: it is written in another way.
    """
    found = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
        r"\{([^}:]*)\}",
        attributes,
    )
    if found is None:
        raise ValueError(f"groups of devices that are not known: {attributes[:200]}")
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    ids = _iota(_whole(found[2]) or [math.prod(sizes.values())], _whole(found[3]))
    along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", found[4])]
    ids = np.moveaxis(ids.reshape(list(sizes.values())), along, range(-len(along), 0))
    return ids.reshape(-1, math.prod(ids.shape[-len(along) :])).tolist()


def _whole(text: str | None) -> list[int]:
    return [int(number) for number in text.split(",")] if text else []


def _iota(dims: list[int], order: list[int]) -> np.ndarray:
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(order) if order else ids


def _axes(groups: list[list[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    sizes = tuple(mesh_shape.values())
    varying = set()
    for group in groups:
        positions = np.stack(np.unravel_index(group, sizes))
        varying |= set(np.flatnonzero((positions != positions[:, :1]).any(axis=1)))
    return tuple(axis for number, axis in enumerate(mesh_shape) if number in varying)
