"""The mechanism behind the mapping tables: foreign names and axes to ours, and back.

A table is a list of rules. The same rule reads and writes, because an einops pattern can be turned
round; which entries there must be, and of which shapes, follows from our own parameters' shapes.
Nothing is skipped in silence: an entry that is missing, unexpected, claimed twice or of another
shape is an error, and all of them are reported together.
"""

import collections
import dataclasses
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import NamedTuple

import numpy as np
from einops import rearrange

from clip_jax.errors import WeightsError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
        theirs: a name in the foreign file. A field in braces stands for a number: `{layer}` counts
            along the leading axis of our stacked parameters; any other field is in `ours`, too.
        ours: a path in our parameters ("/" between); or several, and the entry is split over them.
        axes: an einops pattern, their axes -> ours (of one layer). With several paths the first
            axis on the right counts them. Empty: the axes are the same.
        first_layer: the number of the first layer of our stack.
    """

    theirs: str
    ours: str | tuple[str, ...]
    axes: str = ""
    first_layer: int = 0

    @property
    def paths(self) -> tuple[str, ...]:
        """`ours` as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


def prefixed(theirs: str, ours: str, rules: Iterable[Rule]) -> list[Rule]:
    """The rules of a part, such as a block, as the rules of a whole that holds it."""
    return [
        dataclasses.replace(
            rule,
            theirs=theirs + rule.theirs,
            ours=ours + rule.ours
            if isinstance(rule.ours, str)
            else tuple(ours + path for path in rule.ours),
        )
        for rule in rules
    ]


class Tensors(NamedTuple):
    """A file of named arrays, opened; an array is read when it is asked for."""

    source: str  # for messages
    shapes: Mapping[str, Shape]
    read: Callable[[str], np.ndarray]

    def renamed(self, rename: Callable[[str], str | None]) -> "Tensors":
        """The same arrays under other names; those renamed to None are left out."""
        originals = {new: old for old in self.shapes if (new := rename(old)) is not None}
        return Tensors(
            self.source,
            {new: self.shapes[old] for new, old in originals.items()},
            lambda name: self.read(originals[name]),
        )


class Entry(NamedTuple):
    """One array of the foreign file, as our shapes demand it."""

    name: str
    shape: Shape
    paths: tuple[str, ...]
    layer: int | None  # in the stack; None: not stacked
    axes: str
    sizes: dict[str, int]  # of the axes that the pattern names


def plan(
    rules: Sequence[Rule], shapes: Mapping[str, Shape], sizes: Mapping[str, int]
) -> list[Entry]:
    """Every entry that a file must hold for a model.

    Args:
        rules: the table. A rule whose paths the model does not have is passed over.
        shapes: our path -> shape, of all parameters and statistics.
        sizes: of axes that no shape tells, such as the patch size.

    Raises:
        WeightsError: the table leaves a path out, fills one twice, or claims a name twice.
    """
    entries = [entry for rule in rules for entry in _entries(rule, shapes, sizes)]
    names = collections.Counter(entry.name for entry in entries)
    filled = collections.Counter((path, entry.layer) for entry in entries for path in entry.paths)
    covered = {path for path, _ in filled}
    problems = [f"no rule fills {path}" for path in shapes if path not in covered]
    problems += [
        f"more than one rule fills {path}" + ("" if layer is None else f", layer {layer}")
        for (path, layer), count in filled.items()
        if count > 1
    ]
    problems += [f"more than one rule claims {name}" for name, count in names.items() if count > 1]
    if problems:
        raise WeightsError("the mapping table is wrong:\n  " + "\n  ".join(problems))
    return entries


def _entries(rule: Rule, shapes: Mapping[str, Shape], sizes: Mapping[str, int]) -> Iterator[Entry]:
    pattern = re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(rule.paths[0])))
    stacked = "{layer}" in rule.theirs and "{layer}" not in rule.paths[0]
    for path in shapes:
        match = pattern.fullmatch(path)
        if not match:
            continue
        fields = match.groupdict()
        paths = tuple(template.format(**fields) for template in rule.paths)
        shape = shapes[path]
        layers = range(shape[0]) if stacked else (None,)
        shape = shape[1:] if stacked else shape
        if len(paths) > 1:
            shape = (len(paths), *shape)
        theirs, named = _their_shape(rule.axes, shape, sizes)
        for layer in layers:
            if layer is not None:
                fields["layer"] = str(layer + rule.first_layer)
            yield Entry(rule.theirs.format(**fields), theirs, paths, layer, rule.axes, named)


def _their_shape(axes: str, shape: Shape, sizes: Mapping[str, int]) -> tuple[Shape, dict[str, int]]:
    """The shape on the left of a pattern, from the shape on its right and known sizes."""
    if not axes:
        return shape, {}
    left, right = ([a or b for a, b in _AXIS.findall(side)] for side in axes.split("->"))
    found: dict[str, int] = {}
    for group, length in zip(right, shape, strict=True):
        names = group.split()
        known = {name: sizes[name] for name in names if name in sizes}
        unknown = [name for name in names if name not in sizes and name != "1"]
        found |= known
        if unknown:
            (name,) = unknown
            found[name] = length // prod(known.values())
    theirs = tuple(prod(found.get(name, 1) for name in group.split()) for group in left)
    return theirs, found


_AXIS = re.compile(r"\(([^)]*)\)|(\S+)")


def read(
    entries: Sequence[Entry], tensors: Tensors, ignored: Sequence[str] = ()
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads a file, a few arrays at a time: no more is in memory than the result and those few.

    Args:
        entries: from `plan`.
        tensors: the file.
        ignored: regular expressions of names that hold nothing learned, such as masks.

    Yields:
        (our path, float32 array of our shape), in the order of the table.

    Raises:
        WeightsError: entries that are missing, unexpected or mis-shaped, all of them.
    """
    _check(entries, tensors, ignored)

    def filled(group: list[Entry]) -> list[tuple[str, np.ndarray]]:
        arrays: list[np.ndarray] = []
        for entry in group:
            tensor = np.asarray(tensors.read(entry.name)).reshape(entry.shape)
            if entry.axes:
                tensor = rearrange(tensor, entry.axes, **entry.sizes)
            parts = tensor if len(entry.paths) > 1 else [tensor]
            stack = () if entry.layer is None else (len(group),)
            if not arrays:
                arrays = [_empty(stack + part.shape) for part in parts]
            for array, part in zip(arrays, parts, strict=True):
                _copy(part, array if entry.layer is None else array[entry.layer, ...])
        return list(zip(group[0].paths, arrays, strict=True))

    with ThreadPoolExecutor(_READERS) as pool:
        for arrays in pool.map(filled, _by_paths(entries).values()):
            yield from arrays


_READERS = 4  # most of the time each waits for new pages of memory


def _empty(shape: Shape) -> np.ndarray:
    """Whole pages of memory: JAX on a CPU takes over what is aligned, without a copy.

    Large ones, where the system has them: most of the time goes into touching new pages.
    """
    memory = mmap.mmap(-1, 4 * prod(shape))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)


def _copy(view: np.ndarray, out: np.ndarray) -> None:
    """out[...] = view, a transposed view in tiles: four times as fast as NumPy takes it."""
    dense = int(np.argmin(view.strides)) if view.ndim else 0  # the axis along which memory runs
    if view.ndim < 2 or dense == view.ndim - 1:
        out[...] = view
        return
    source, target = (np.moveaxis(array, (dense, -1), (-2, -1)) for array in (view, out))
    for index in np.ndindex(source.shape[:-2]):
        for start in range(0, source.shape[-1], _TILE):
            tile = (*index, slice(None), slice(start, start + _TILE))
            target[tile] = source[tile]


_TILE = 64  # rows of the source whose cache lines the first-level cache holds


def _by_paths(entries: Sequence[Entry]) -> dict[tuple[str, ...], list[Entry]]:
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.paths, []).append(entry)
    return groups


def _check(entries: Sequence[Entry], tensors: Tensors, ignored: Sequence[str]) -> None:
    expected = {entry.name: entry.shape for entry in entries}
    nothing = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
    found = {k: v for k, v in tensors.shapes.items() if k in expected or not nothing.fullmatch(k)}
    problems = [
        f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found
    ]
    problems += [
        f"unexpected: {name} {list(shape)}" for name, shape in found.items() if name not in expected
    ]
    problems += [
        f"mis-shaped: {name}: expected {list(shape)}, found {list(found[name])}"
        for name, shape in expected.items()
        # Torch programs keep a learned scalar with no axis or with one of length 1.
        if name in found and found[name] != shape and not (shape == () and found[name] == (1,))
    ]
    if problems:
        raise WeightsError(
            f"{tensors.source} does not fit the model ({len(problems)} of its entries):\n  "
            + "\n  ".join(problems)
        )


def write(entries: Sequence[Entry], params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `read`: our path -> array becomes their name -> contiguous array."""
    tensors = {}
    for entry in entries:
        parts = [np.asarray(params[path]) for path in entry.paths]
        if entry.layer is not None:
            parts = [part[entry.layer] for part in parts]
        tensor = np.stack(parts) if len(parts) > 1 else parts[0]
        if entry.axes:
            left, right = entry.axes.split("->")
            tensor = rearrange(tensor, f"{right} -> {left}", **entry.sizes)
        tensors[entry.name] = np.ascontiguousarray(tensor).reshape(entry.shape)
    return tensors
