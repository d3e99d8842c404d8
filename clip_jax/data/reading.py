"""Bytes of a shard, from an offset on, in large reads; storage that stumbles is asked again."""

import time

import tensorflow as tf

BLOCK = 4 << 20
# Seconds to wait before each further attempt: five minutes in all, then the shard is given up.
WAITS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 90.0, 105.0)

_PERMANENT = (
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.InvalidArgumentError,
    tf.errors.FailedPreconditionError,
    tf.errors.UnimplementedError,
    tf.errors.UnauthenticatedError,
)


class ShardFile:
    """A file read forward.

    Attributes:
        path: local or gs://.
        offset: of the next byte that `take` gives.
    """

    def __init__(self, path: str, offset: int = 0):
        self.path = path
        self.offset = offset
        self._buffer = b""
        self._at = 0  # in the buffer, of `offset`
        self._size = 0
        self._file: tf.io.gfile.GFile | None = None

    def peek(self, length: int) -> bytes:
        """The next bytes; fewer at the end of the file.

        Raises:
            tf.errors.OpError: the file cannot be read, also after waiting.
        """
        missing = self._at + length - len(self._buffer)
        if missing > 0:
            rest = self._buffer[self._at :]
            more = self._read(self.offset + len(rest), max(missing, BLOCK))
            self._buffer, self._at = rest + more, 0
        return self._buffer[self._at : self._at + length]

    def take(self, length: int) -> bytes:
        """The next bytes, which are then behind; fewer at the end of the file."""
        taken = self.peek(length)
        self.offset += len(taken)
        self._at += len(taken)
        return taken

    def skip(self, length: int) -> None:
        """Goes forward without reading what is not in memory yet."""
        self.offset += length
        self._at += length
        if self._at > len(self._buffer):
            self._buffer, self._at = b"", 0

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, offset: int, length: int) -> bytes:
        for wait in (*WAITS, None):
            try:
                if self._file is None:
                    self._file = tf.io.gfile.GFile(self.path, "rb")
                    self._size = self._file.size()
                if offset >= self._size:
                    return b""
                self._file.seek(offset)
                return self._file.read(min(length, self._size - offset))
            except tf.errors.OpError as error:
                self._file = None  # another attempt opens it anew
                if wait is None or isinstance(error, _PERMANENT):
                    raise
                time.sleep(wait)
        raise AssertionError("unreachable")
