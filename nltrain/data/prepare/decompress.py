"""Reads compressed files: .gz, .zst, .bz2, .xz. A stream that ends early is an error.

Memory stays bounded whatever the uncompressed size; .zst streams may have windows of up to 2 GiB (`zstd --long=31`).
"""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nltrain.data.errors import DataError
from nltrain.data.prepare.inputs import InputFile, compression

BUFFER_BYTES = 1 << 20
# 4 bytes can decompress to a block of 128 KiB, so one read gives at most 64 MiB.
ZSTD_FEED_BYTES = 2 << 10
ZSTD_WINDOW_BYTES = 1 << 31


@contextlib.contextmanager
def opened(file: InputFile, path: Path) -> Iterator[BinaryIO]:
    """The decompressed content of `file`, which lies at `path`. Raises DataError with its URL when it is damaged."""
    import zstandard

    kind = compression(file.key)
    try:
        with contextlib.ExitStack() as stack:
            stream: Any = stack.enter_context(open(path, "rb"))
            if kind and not file.num_bytes:
                raise EOFError("Compressed file without any content")
            if kind == ".gz":
                stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
            elif kind == ".bz2":
                stream = stack.enter_context(bz2.BZ2File(stream))
            elif kind == ".xz":
                stream = stack.enter_context(lzma.LZMAFile(stream))
            elif kind == ".zst":
                stream = stack.enter_context(_ZstdFile(stream))
            yield stack.enter_context(io.BufferedReader(stream, BUFFER_BYTES))
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, MemoryError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file.url}: cannot be read: {said}: restore the file or leave it out") from error


class _ZstdFile(io.RawIOBase):
    """All frames of a stream. Needed because the library's own reader accepts a truncated stream."""

    def __init__(self, source: BinaryIO) -> None:
        import zstandard

        self._source, self._library = source, zstandard
        self._frame: Any = None
        self._compressed, self._ready, self._position = b"", b"", 0

    def readable(self) -> bool:
        """True, as io.RawIOBase asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer from the front; returns the number of bytes, 0 at the end."""
        while self._position == len(self._ready):
            if not self._unpack():
                return 0
        part = memoryview(self._ready)[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _unpack(self) -> bool:
        """Decompresses the next bytes; False at the end."""
        data = self._compressed or self._source.read(ZSTD_FEED_BYTES)
        self._compressed, self._ready, self._position = b"", b"", 0
        if not data:
            if self._frame is not None:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            return False
        if self._frame is None:
            window = self._library.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
            self._frame = window.decompressobj()
        self._ready = self._frame.decompress(data)
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None
        return True
