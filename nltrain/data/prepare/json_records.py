"""JSON records of a stream of bytes, with their line numbers: one a line, over several lines, or in an array.

In JSON lines a damaged line is one bad record with a reason and never an error. In an array or over several lines the
end of a damaged record cannot be known, so it raises DataError. Memory is bounded by the longest record allowed.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from nltrain.data.errors import DataError

READ_BYTES = 1 << 20
_DECODER = json.JSONDecoder()
# For integers of more digits than Python converts.
_LENIENT = json.JSONDecoder(parse_int=str)
_BLANKS = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"


class Bad(NamedTuple):
    """Stands in place of a record and says why there is none."""

    reason: str


def shape(stream: BinaryIO, max_record_bytes: int) -> str:
    """What a .json file holds: "lines" of one record each, one "array", or "values", each over several lines."""
    # An array may be one line of any length, which need not be read to its end. But a compressed stream may give only a
    # few bytes at once, so that what can be seen ahead is blank.
    head = stream.peek(1).removeprefix(_BOM)  # type: ignore[attr-defined]
    if head.lstrip().startswith(b"["):
        return "array"
    for line in _lines(stream, max_record_bytes):
        if not line.strip():
            continue
        if line.lstrip().startswith(b"["):
            return "array"
        if not isinstance(_parse(line), Bad) or not line.lstrip().startswith(b"{"):
            return "lines"
        first = next(_values(stream, line + b"\n", "", max_record_bytes, in_array=False, may_fail=True), None)
        return "lines" if first is None else "values"
    return "lines"


def lines(stream: BinaryIO, max_record_bytes: int) -> Iterator[tuple[int, Any]]:
    """(line number, record or Bad) of each line that is not blank."""
    for number, line in enumerate(_lines(stream, max_record_bytes), 1):
        if len(line) > max_record_bytes:
            yield number, Bad("longer than prepare.max_record_bytes")
        elif line.strip():
            yield number, _parse(line)


def values(stream: BinaryIO, url: str, max_record_bytes: int, in_array: bool) -> Iterator[tuple[int, Any]]:
    """(line number, record) of an array's records, or of records over several lines. Raises DataError for damage."""
    return _values(stream, b"", url, max_record_bytes, in_array, may_fail=False)


def _lines(stream: BinaryIO, max_record_bytes: int) -> Iterator[bytes]:
    """The lines without line break and byte-order mark. A line that is too long is cut, but still too long."""
    first = True
    while line := stream.readline(max_record_bytes + 2):
        if not line.endswith(b"\n") and len(line) > max_record_bytes:
            while (rest := stream.readline(READ_BYTES)) and not rest.endswith(b"\n"):
                pass
        line = line.removesuffix(b"\n")
        yield line.removeprefix(_BOM) if first else line
        first = False


def _parse(line: bytes) -> Any:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return Bad("not UTF-8")
    try:
        return _DECODER.decode(text)
    except RecursionError:
        return Bad("nested too deeply")
    except json.JSONDecodeError:
        return Bad("not JSON")
    except ValueError:
        pass
    try:
        return _LENIENT.decode(text)
    except RecursionError:
        return Bad("nested too deeply")
    except ValueError:
        return Bad("not JSON")


class _Text:
    """A stream as text with a position; the text before the position is discarded when more is read."""

    def __init__(self, stream: BinaryIO, begun: bytes) -> None:
        self._stream, self._begun = stream, begun
        # Bytes that are not UTF-8 become surrogates, so that only their own record is bad, not the file.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._first = True
        self.text, self.position, self.line, self.ended = "", 0, 1, False

    @property
    def num_ahead(self) -> int:
        """Characters that are read and lie after the position."""
        return len(self.text) - self.position

    def more(self) -> bool:
        """Reads more of the stream; False at its end."""
        data = self._begun or self._stream.read(READ_BYTES)
        self._begun = b""
        self.ended = not data
        added = self._decoder.decode(data.removeprefix(_BOM) if self._first else data, final=self.ended)
        self.text, self.position = self.text[self.position :] + added, 0
        self._first = False
        return not self.ended

    def skip_blanks(self) -> str:
        """Passes white space; returns the next character, empty at the end."""
        while True:
            blanks = _BLANKS.match(self.text, self.position)
            self.pass_to(blanks.end() if blanks else self.position)
            if self.num_ahead or not self.more():
                return self.text[self.position : self.position + 1]

    def pass_to(self, end: int) -> None:
        """Moves the position, and the line number with it."""
        self.line += self.text.count("\n", self.position, end)
        self.position = end


def _values(
    stream: BinaryIO, begun: bytes, url: str, max_record_bytes: int, in_array: bool, may_fail: bool
) -> Iterator[tuple[int, Any]]:
    source = _Text(stream, begun)
    if in_array and source.skip_blanks() == "[":
        source.pass_to(source.position + 1)
    first = True
    while True:
        following = source.skip_blanks()
        if in_array and following == "]":
            source.pass_to(source.position + 1)
            if source.skip_blanks():
                raise _damaged(url, source, "something follows the array")
            return
        if not following:
            if in_array:
                raise _damaged(url, source, "the array has no end")
            return
        if in_array and not first:
            if following != ",":
                raise _damaged(url, source, "no comma between two records")
            source.pass_to(source.position + 1)
            source.skip_blanks()
        number = source.line
        found = _next_value(source, max_record_bytes)
        if isinstance(found, str):
            if may_fail:
                return
            raise _damaged(url, source, found)
        yield number, found[0]
        first = False


def _next_value(source: _Text, max_record_bytes: int) -> tuple[Any] | str:
    """(the value at the position,), moving the position behind it; or why there is none."""
    while True:
        try:
            value, end = _raw_decode(source.text, source.position)
            # A number at the end of the text may continue in what is not read yet.
            if end < len(source.text) or source.ended:
                source.pass_to(end)
                return (value,)
        except RecursionError:
            return "nested too deeply"
        except ValueError:
            if source.ended:
                return "not JSON, or cut off"
        if source.num_ahead > max_record_bytes:
            return "a record is not JSON, or longer than prepare.max_record_bytes"
        for _ in range(1 + source.num_ahead // READ_BYTES):  # doubles the text: each byte is parsed at most twice
            if not source.more():
                break


def _raw_decode(text: str, position: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _LENIENT.raw_decode(text, position)


def _damaged(url: str, source: _Text, why: str) -> DataError:
    return DataError(f"{url}:{source.line}: {why}: restore the file, or write one record a line as .jsonl")
