"""Reads the text of a compiled HLO module: computations, instructions, and how often each runs.

Only what counting needs: names, shapes, operands, attributes. The text is what
`jax.stages.Compiled.as_text` gives, of any backend.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array.

    Attributes:
        dtype: as HLO writes it, such as "bf16".
        dims: sizes.
        memory_space: 0 is the main memory; others are on the chip (TPU: 1, the vector memory).
    """

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without what the layout pads."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(digits[0]) if digits else 0
        return math.ceil(self.size * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: without the percent sign.
        shapes: of the result; of all leaves, where it is a tuple.
        opcode: such as "dot".
        operands: names of instructions of the same computation; of a constant and of a parameter
            the text between the parentheses.
        attributes: the text behind the operands.
        root: it is the computation's result.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        """Of all leaves."""
        return sum(shape.bytes for shape in self.shapes)

    def attribute(self, name: str) -> str | None:
        """What follows `name=`, up to the next attribute; braces are kept together."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        return _until_comma(self.attributes, found.end()) if found else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """The whole numbers in an attribute; () where there is none."""
        return tuple(int(number) for number in re.findall(r"-?\d+", self.attribute(name) or ""))

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Computations that it runs, by the attribute that names them."""
        found = {}
        for name in ("calls", "to_apply", "body", "condition", "branch_computations",
                     "true_computation", "false_computation", "called_computations"):  # fmt: skip
            value = self.attribute(name)
            if value is not None:
                found[name] = tuple(re.findall(r"[\w.\-]+", value.replace("%", "")))
        return found


Computation = dict[
    str, Instruction
]  # in the order of the text: of the schedule, where there is one


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program, one device's share of it."""

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def executions(self) -> dict[str, int]:
        """How often each computation runs in one run of the program.

        Bodies of loops run as often as their trip count says; all branches of a conditional count,
        and the small computations that a reduction applies count once.
        """
        counts = dict.fromkeys(self.computations, 0)

        def visit(name: str, times: int) -> None:
            counts[name] += times
            for instruction in self.computations[name].values():
                trips = trip_count(self, instruction) if instruction.opcode == "while" else 1
                for kind, called in instruction.called.items():
                    for other in called:
                        if other in self.computations:
                            again = trips + (kind == "condition" and trips > 0)
                            visit(other, times * (again if instruction.opcode == "while" else 1))

        visit(self.entry, 1)
        return counts

    def instructions(self) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it runs) of everything that runs."""
        for name, computation in self.computations.items():
            if self.executions[name]:
                for instruction in computation.values():
                    yield name, instruction, self.executions[name]

    @functools.cached_property
    def fused(self) -> frozenset[str]:
        """Computations inside a fusion: what passes between their instructions is never stored."""
        inside: set[str] = set()
        for computation in self.computations.values():
            for instruction in computation.values():
                if instruction.opcode == "fusion":
                    inside.update(instruction.called.get("calls", ()))
                if instruction.opcode != "call":
                    inside.update(instruction.called.get("to_apply", ()))
        return frozenset(inside)


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
        ValueError: text without an entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if head:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            instruction = parse_instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY")
    return Module(computations, entry)


def parse_instruction(line: str) -> Instruction | None:
    """Reads one line of a computation; None for a line that is no instruction."""
    head = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opcode = re.match(r" ?([\w\-]+)\(", line[end:])
    if not opcode:
        return None
    opened = end + opcode.end() - 1
    closed = _closing(line, opened)
    inside = line[opened + 1 : closed]
    literal = opcode[1] in ("constant", "parameter")
    return Instruction(
        head[2],
        parse_shapes(line[start:end]),
        opcode[1],
        (inside,) if literal else tuple(_operands(inside)),
        line[closed + 1 :].lstrip(", "),
        bool(head[1]),
    )


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """All arrays in a shape's text, such as `(f32[2,3]{1,0}, bf16[4]{0:T(256)S(1)})`."""
    return tuple(
        Shape(
            dtype,
            tuple(int(size) for size in re.findall(r"\d+", dims)),
            int(space[1]) if (space := re.search(r"S\((\d+)\)", layout or "")) else 0,
        )
        for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", text)
    )


def trip_count(module: Module, loop: Instruction) -> int:
    """How often a `while` runs its body: what the compiler says, or what its condition compares.

    Raises:
        ValueError: neither tells.
    """
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.called["condition"][0]]
    bounds = {
        int(instruction.operands[0])
        for instruction in _with_called(module, condition)
        if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.operands[0])
    }
    if len(bounds) == 1:  # a scan counts from 0 by 1
        return bounds.pop()
    raise ValueError(f"the trip count of the loop {loop.name} is not known: constants {bounds}")


def _with_called(module: Module, computation: Computation) -> Iterator[Instruction]:
    for instruction in computation.values():
        yield instruction
        for names in instruction.called.values():
            for name in names:
                yield from _with_called(module, module.computations.get(name, {}))


_OPENING, _CLOSING = "([{", ")]}"


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in _OPENING) - (text[position] in _CLOSING)
        if depth == 0:
            return position
    raise ValueError(f"unbalanced brackets: {text[start : start + 80]}")


def _until_comma(text: str, start: int) -> str:
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in _OPENING) - (text[position] in _CLOSING)
        if depth < 0 or (depth == 0 and text[position] == ","):
            return text[start:position]
    return text[start:]


def _operands(inside: str) -> Iterator[str]:
    """Names; shapes before them are left out, and comments such as /*index=5*/."""
    inside, start = re.sub(r"/\*.*?\*/", "", inside), 0
    while start < len(inside):
        operand = _until_comma(inside, start)
        start += len(operand) + 1
        yield operand.split()[-1].lstrip("%")
