"""Samples of a WebDataset tar from any of their offsets, past what is damaged.

A sample is a run of files that share a key, the path up to the first dot of the file's name:
`00/000123.jpg`, `00/000123.txt`, `00/000123.json`. A header that is damaged costs its own sample.
"""

from collections.abc import Iterator
from typing import NamedTuple

from clip_jax.data.faults import CORRUPT_RECORD, TRUNCATED_SHARD, Fault
from clip_jax.data.reading import BLOCK, ShardFile

LONGEST = 1 << 31  # bytes of a file: none of a pair comes near it
_BLOCK = 512
_MAGIC = b"ustar"
_ZEROS = bytes(_BLOCK)


class Sample(NamedTuple):
    """The files of one key."""

    end: int  # offset of the next sample
    key: str
    files: dict[str, bytes]  # by extension, such as "jpg" or "seg.png", lower-cased
    fault: Fault | None = None


class _File(NamedTuple):
    start: int  # offset of its header, or of the extended headers before it
    name: str
    content: bytes | Fault


def samples(file: ShardFile) -> Iterator[Sample]:
    """Yields the samples from where `file` stands, which must be the start of one."""
    sample: Sample | None = None
    for start, name, content in _files(file):
        key, extension = _split(name)
        if sample is not None and (sample.key != key or not name):
            yield sample._replace(end=start)
            sample = None
        if sample is None:
            sample = Sample(file.offset, key, {})
        if isinstance(content, Fault):
            sample = sample._replace(fault=content)
        else:
            sample.files[extension] = content
        if not name:  # a header that cannot be read: whose file it was is unknown
            yield sample._replace(end=file.offset)
            sample = None
    if sample is not None:
        yield sample._replace(end=file.offset)


def _split(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _files(file: ShardFile) -> Iterator[_File]:
    start, long_name = file.offset, ""
    while header := file.peek(_BLOCK):
        if len(header) < _BLOCK:
            file.skip(len(header))
            yield _File(start, "", Fault(TRUNCATED_SHARD, "it ends within a tar header"))
            return
        if header == _ZEROS:  # the end, or a gap
            file.skip(_BLOCK)
            start = file.offset
            continue
        size = _checked_size(header)
        if size is None:
            _next_header(file)
            yield _File(start, "", Fault(CORRUPT_RECORD, "a tar header is damaged"))
            start, long_name = file.offset, ""
            continue
        file.skip(_BLOCK)
        kind = header[156:157]
        if kind in (b"0", b"\0", b"L", b"x", b"g"):  # files, long names, extended headers
            content = file.take(size)
            whole = len(content) == size
            file.skip(-size % _BLOCK if whole else 0)
        else:  # a folder, a link
            file.skip(size + -size % _BLOCK)
            start = file.offset
            continue
        if not whole:
            yield _File(start, long_name or _name(header), Fault(TRUNCATED_SHARD, "it ends here"))
            return
        if kind == b"L":
            long_name = _text(content)
        elif kind == b"x":
            long_name = _pax_path(content) or long_name
        elif kind != b"g":
            yield _File(start, long_name or _name(header), content)
            start, long_name = file.offset, ""


def _checked_size(header: bytes) -> int | None:
    """The size that a header gives; None if its checksum is wrong."""
    try:
        checksum = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    if sum(header) - sum(header[148:156]) + 8 * 0x20 != checksum:
        return None
    field = header[124:136]
    try:
        if field[0] & 0x80:  # GNU: binary
            size = int.from_bytes(field, "big") & ((1 << 95) - 1)
        else:
            size = int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    return size if 0 <= size <= LONGEST else None


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == _MAGIC + b"\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")


def _pax_path(content: bytes) -> str:
    """The path among the records of an extended header, such as `30 path=...`."""
    at = 0
    while at < len(content):
        length = content[at:].partition(b" ")[0]
        if not length.isdigit() or int(length) == 0:
            break
        name, _, value = content[at : at + int(length)].partition(b" ")[2].partition(b"=")
        if name == b"path":
            return value[:-1].decode("utf-8", "replace")
        at += int(length)
    return ""


def _next_header(file: ShardFile) -> None:
    """Goes to the next block that is a header, or to the end."""
    file.skip(_BLOCK)
    while chunk := file.peek(BLOCK):
        at = chunk.find(_MAGIC)
        while at >= 0:
            start = at - 257
            if start >= 0 and start % _BLOCK == 0:
                header = chunk[start : start + _BLOCK]
                if len(header) == _BLOCK and _checked_size(header) is not None:
                    file.skip(start)
                    return
            at = chunk.find(_MAGIC, at + 1)
        if len(chunk) < BLOCK:
            file.skip(len(chunk))
            return
        file.skip(len(chunk))
