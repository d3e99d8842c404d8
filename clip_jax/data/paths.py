"""Patterns of shard paths -> paths, local or gs://."""

import itertools
import re
from collections.abc import Sequence

import tensorflow as tf

from clip_jax.errors import DataError

_LISTED_FROM = 8  # paths in a folder: cheaper to list it than to ask for each


def expand_paths(spec: str) -> list[str]:
    """Commas between, braces within, and wildcards -> the paths, which must exist.

    `{00000..00099}` counts, keeping the digits, `{a,b}` lists, and several groups multiply.

    Raises:
        DataError: a pattern that matches nothing, or a file that is not there.
    """
    paths: list[str] = []
    for pattern in re.split(r",(?![^{]*\})", spec):
        named = _expand_braces(pattern)
        for path in named:
            paths += _glob(path, spec) if re.search(r"[*?\[]", path) else [path]
        _require([path for path in named if not re.search(r"[*?\[]", path)], spec)
    return paths


def is_folder(path: str) -> bool:
    """Whether a folder is there.

    Raises:
        DataError: it cannot be asked.
    """
    try:
        return tf.io.gfile.isdir(path)
    except tf.errors.OpError as error:
        raise DataError(f"cannot list {path}: {error.message}") from error


def list_folder(path: str) -> list[str]:
    """Names in a folder, folders without their slash, sorted.

    Raises:
        DataError: there is no such folder, or it may not be read.
    """
    try:
        return sorted(name.rstrip("/") for name in tf.io.gfile.listdir(path))
    except tf.errors.OpError as error:
        raise DataError(f"cannot list {path}: {error.message}") from error


def join(folder: str, name: str) -> str:
    """A path in a folder; one that is absolute or has a scheme stays as it is."""
    return name if name.startswith("/") or "://" in name else f"{folder.rstrip('/')}/{name}"


def _glob(pattern: str, spec: str) -> list[str]:
    try:
        found = sorted(tf.io.gfile.glob(pattern))
    except tf.errors.OpError as error:
        raise DataError(f"cannot list {pattern}: {error.message}") from error
    if not found:
        raise _nothing(pattern, spec)
    return found


def _require(paths: Sequence[str], spec: str) -> None:
    """A hundred thousand shards are looked for in one listing of their folder."""
    for folder, group in itertools.groupby(paths, lambda path: path.rpartition("/")[0]):
        expected = list(group)
        if len(expected) < _LISTED_FROM:
            missing = (path for path in expected if not _exists(path))
        else:
            names = set(list_folder(folder or ".")) if is_folder(folder or ".") else set()
            missing = (path for path in expected if path.rpartition("/")[2] not in names)
        for path in missing:
            raise _nothing(path, spec)


def _exists(path: str) -> bool:
    try:
        tf.io.gfile.stat(path)
    except tf.errors.NotFoundError:
        return False
    except tf.errors.OpError as error:
        raise DataError(f"cannot list {path}: {error.message}") from error
    return True


def _nothing(path: str, spec: str) -> DataError:
    return DataError(f"no shard matches {path} (of config.data.train={spec!r})")


def _expand_braces(pattern: str) -> list[str]:
    """{000..009} -> ten names of three digits; {a,b} -> two names; several groups multiply."""
    parts: list[list[str]] = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if numbers:
            first, last = numbers.groups()
            if int(last) < int(first):
                raise DataError(f"{part} counts backwards in {pattern!r}")
            parts.append([f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)])
        elif part.startswith("{"):
            parts.append(part[1:-1].split(","))
        else:
            parts.append([part])
    return ["".join(combination) for combination in itertools.product(*parts)]
