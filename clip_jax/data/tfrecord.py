"""Records of a TFRecord file from any of its offsets, past those that are damaged.

A record is its length (uint64), a checksum of that, the bytes, and a checksum of those.
TensorFlow's own reader gives up at the first wrong checksum; here a damaged record costs itself.
"""

import re
import struct
from collections.abc import Iterator

import google_crc32c

from clip_jax.data.faults import CORRUPT_RECORD, TRUNCATED_SHARD, Fault
from clip_jax.data.reading import BLOCK, ShardFile

_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")
LONGEST = 1 << 31  # bytes of a record: what protocol buffers allow


def records(file: ShardFile) -> Iterator[tuple[int, bytes | Fault]]:
    """Yields (the offset behind a record, the record or what is wrong with it)."""
    while header := file.peek(_HEADER.size):
        if len(header) < _HEADER.size:
            file.skip(len(header))
            yield file.offset, Fault(TRUNCATED_SHARD, "it ends within a record")
            return
        length = _checked_length(header)
        if length is None:
            yield _next_header(file), Fault(CORRUPT_RECORD, "the checksum of its length is wrong")
            continue
        file.skip(_HEADER.size)
        body = file.take(length + _CRC.size)
        record = body[:length]
        if len(body) < length + _CRC.size:
            yield file.offset, Fault(TRUNCATED_SHARD, "it ends within a record")
        elif _CRC.unpack_from(body, length)[0] != masked_crc(record):
            yield file.offset, Fault(CORRUPT_RECORD, "its checksum is wrong")
        else:
            yield file.offset, record


def skip_records(file: ShardFile, count: int) -> None:
    """Goes past records, reading their lengths only."""
    for _ in range(count):
        header = file.peek(_HEADER.size)
        length = _checked_length(header) if len(header) == _HEADER.size else None
        if length is None:
            _next_header(file)
        else:
            file.skip(_HEADER.size + length + _CRC.size)


def frame(record: bytes) -> bytes:
    """The record as it lies in a file."""
    length = struct.pack("<Q", len(record))
    return b"".join([length, _CRC.pack(masked_crc(length)), record, _CRC.pack(masked_crc(record))])


def masked_crc(data: bytes) -> int:
    """TFRecord's checksum: CRC-32C, rotated and offset."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _checked_length(header: bytes) -> int | None:
    length, crc = _HEADER.unpack(header)
    return length if length <= LONGEST and crc == masked_crc(header[:8]) else None


def _next_header(file: ShardFile) -> int:
    """Goes to the next place that holds a length with its checksum, or to the end."""
    file.skip(1)
    while chunk := file.peek(BLOCK):
        # The upper half of a length is four zero bytes, which are rare in compressed data; the
        # checksum behind them is never zero, so only the end of a run of zeros can be that place.
        for zeros in re.finditer(rb"\0{4,}", chunk):
            first = max(zeros.start() - 4, zeros.end() - 11, 0)
            for start in range(first, min(zeros.end() - 7, len(chunk) - _HEADER.size + 1)):
                if _checked_length(chunk[start : start + _HEADER.size]) is not None:
                    file.skip(start)
                    return file.offset
        file.skip(len(chunk) if len(chunk) < BLOCK else len(chunk) - _HEADER.size + 1)
    return file.offset
