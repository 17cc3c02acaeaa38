"""The documents in input files: text, JSON lines, JSON arrays and parquet.

A text file is one document; so is a JSON record or a parquet row, which is named file:line. Guarantees: a record gives
a document, or it is bad and counted with file and line; a file that cannot be read to its end raises DataError with its
URL. A long document is cut into passages, so memory does not grow with it. Limits: a JSON record or a parquet cell is
held in memory whole, and is bad when it is longer than prepare.max_record_bytes.
"""

import codecs
import contextlib
import itertools
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nltrain.data.errors import DataError
from nltrain.data.prepare import json_records
from nltrain.data.prepare.decompress import opened
from nltrain.data.prepare.inputs import EXAMPLES_KEPT, TEXT_KINDS, InputFile, file_kind
from nltrain.store import LocalStore, Store, open_store

DOWNLOAD_PART_BYTES = 16 << 20
# A longer document is tokenised in passages of about this size. It is cut before a line break that follows a letter or
# digit, because the usual tokenizers begin a new token there.
PASSAGE_CHARS = 1 << 20
# A longer text file is read twice: first to check that all of it is UTF-8.
WHOLE_TEXT_BYTES = 4 << 20
PARQUET_BATCH_BYTES = 8 << 20
PARQUET_BATCH_ROWS = 256


class Passage(NamedTuple):
    """A document, or a passage of a long one."""

    name: str
    """Name of the document: stable and unique."""
    text: str
    continues: bool
    """Whether it continues the document of the passage before."""
    where: str
    """For messages: file:line."""


@dataclass
class Dropped:
    """Bad records: their number by reason, and where the first ones are."""

    max_bad: int | None = None
    """Limit of bad records in the whole input; None: not known before all of it is read."""
    max_fraction: float = 1.0
    """prepare.max_bad_fraction, for messages."""
    num_records: int = 0
    by_reason: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    no_records: list[str] = field(default_factory=list)
    """Names of .json files that hold one object without a text: settings, not records."""

    def add(self, where: str, reason: str) -> None:
        """Counts one bad record."""
        self.by_reason[reason] += 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(f"{where}: {reason}")

    def check(self) -> None:
        """Raises DataError as soon as the limit is exceeded, whatever the rest of the input holds."""
        num_bad = self.by_reason.total()
        if self.max_bad is not None and num_bad > self.max_bad:
            raise DataError(
                f"prepare.max_bad_fraction: {self.max_fraction}: {num_bad} records are bad, and of all that the input "
                f"can hold at most {self.max_bad} may be, first: {self.examples[0]}: mend the input or raise the limit"
            )


def read_documents(
    files: Sequence[InputFile], text_field: str, dropped: Dropped, max_record_bytes: int
) -> Iterator[Passage]:
    """The documents of these files, in order and in passages; adds bad records to `dropped`.

    Raises DataError for a file that cannot be read, and when the limit of bad records is exceeded.
    """
    stores: dict[str, Store] = {}
    for file in files:
        kind = file_kind(file.key)
        store = stores.get(file.root) or stores.setdefault(file.root, open_store(file.root))
        with _local_path(store, file) as path:
            if kind in TEXT_KINDS:
                yield from _read_text(file, path, dropped)
            elif kind == ".parquet":
                yield from _read_parquet(file, path, text_field, dropped, max_record_bytes)
            else:
                yield from _read_json(file, path, text_field, dropped, max_record_bytes)
        dropped.check()


def split_text(chunks: Iterable[str]) -> Iterator[str]:
    """The text in passages of at most PASSAGE_CHARS characters, which do not depend on how it is cut into chunks."""
    text = ""
    for chunk in chunks:
        text += chunk
        while len(text) > PASSAGE_CHARS:
            cut = _cut(text)
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def _cut(text: str) -> int:
    end = PASSAGE_CHARS
    while (end := text.rfind("\n", PASSAGE_CHARS // 2, end)) > 0:
        if text[end - 1].isalnum():
            return end
    return PASSAGE_CHARS


def passages(name: str, where: str, chunks: Iterable[str]) -> Iterator[Passage]:
    """The passages of the document whose text consists of these chunks."""
    for number, text in enumerate(split_text(chunks)):
        yield Passage(name, text, number > 0, where)


@contextlib.contextmanager
def _local_path(store: Store, file: InputFile) -> Iterator[Path]:
    """The path of the file on a local disk; a remote file is copied there in parts, whatever its size."""
    if isinstance(store, LocalStore):
        yield store.folder / file.key
        return
    with tempfile.TemporaryDirectory(prefix="nltrain-input-") as folder:
        path = Path(folder, "input")
        try:
            target = open(path, "wb")  # noqa: SIM115 (closed by the next line's with)
            with target:
                for start in range(0, file.num_bytes, DOWNLOAD_PART_BYTES):
                    length = min(DOWNLOAD_PART_BYTES, file.num_bytes - start)
                    target.write(store.get_range(file.key, start, length))
        except OSError as error:
            raise DataError(
                f"{file.url}: its copy in {folder} cannot be written: {error.strerror}: make room, or set TMPDIR to a "
                f"folder with {file.num_bytes / 1e6:.0f} MB free"
            ) from error
        yield path


def _read_text(file: InputFile, path: Path, dropped: Dropped) -> Iterator[Passage]:
    dropped.num_records += 1
    with opened(file, path) as stream:
        data = stream.read(WHOLE_TEXT_BYTES + 1)
    where = f"{file.url}:1"
    chunks: Iterable[str] = ()
    if len(data) > WHOLE_TEXT_BYTES:
        bad_line = _not_utf8_line(file, path)
        chunks = _decoded(file, path)
    else:
        bad_line = 0
        try:
            chunks = [data.decode()]
        except UnicodeDecodeError as error:
            bad_line = 1 + data.count(b"\n", 0, error.start)
    if bad_line:
        dropped.add(f"{file.url}:{bad_line}", "not UTF-8")
    elif not data:
        dropped.add(where, "empty text")
    else:
        yield from passages(file.name, where, chunks)


def _not_utf8_line(file: InputFile, path: Path) -> int:
    """The line of the first byte that is not UTF-8; 0: there is none."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with opened(file, path) as stream:
        while True:
            data = stream.read(WHOLE_TEXT_BYTES)
            held = decoder.getstate()[0]
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                return line + (held + data).count(b"\n", 0, error.start)
            line += data.count(b"\n")
            if not data:
                return 0


def _decoded(file: InputFile, path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with opened(file, path) as stream:
        while data := stream.read(WHOLE_TEXT_BYTES):
            yield decoder.decode(data)


def _read_json(
    file: InputFile, path: Path, text_field: str, dropped: Dropped, max_record_bytes: int
) -> Iterator[Passage]:
    shape = "lines"
    if file_kind(file.key) == ".json":
        with opened(file, path) as stream:
            shape = json_records.shape(stream, max_record_bytes)
    with opened(file, path) as stream:
        if shape == "lines":
            records = json_records.lines(stream, max_record_bytes)
        else:
            records = json_records.values(stream, file.url, max_record_bytes, in_array=shape == "array")
        beginning = list(itertools.islice(records, 2))
        if not beginning or (file_kind(file.key) == ".json" and _is_settings(beginning, text_field)):
            dropped.no_records.append(file.name)
            return
        for number, record in itertools.chain(beginning, records):
            yield from _of_record(file, number, record, text_field, dropped)


def _is_settings(beginning: list[tuple[int, Any]], text_field: str) -> bool:
    """Whether the file holds a single value without a text, as package.json does."""
    record = beginning[0][1]
    return len(beginning) == 1 and not isinstance(record, json_records.Bad) and _text_of(record, text_field) is None


def _text_of(record: Any, text_field: str) -> str | None:
    text = record.get(text_field) if isinstance(record, dict) else None
    return text if isinstance(text, str) else None


def _of_record(file: InputFile, number: int, record: Any, text_field: str, dropped: Dropped) -> Iterator[Passage]:
    """The document of one record, which may be any JSON value, or Bad."""
    dropped.num_records += 1
    where = f"{file.url}:{number}"
    text = _text_of(record, text_field)
    if isinstance(record, json_records.Bad):
        dropped.add(where, record.reason)
    elif text is None:
        dropped.add(where, f"no text in {text_field!r}")
    elif not text:
        dropped.add(where, "empty text")
    elif not _is_utf8(text):  # JSON can spell half of a surrogate pair
        dropped.add(where, "not UTF-8")
    else:
        if len(text) <= PASSAGE_CHARS:
            yield Passage(f"{file.name}:{number}", text, False, where)
        else:
            yield from passages(f"{file.name}:{number}", where, [text])
    dropped.check()


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(
    file: InputFile, path: Path, text_field: str, dropped: Dropped, max_record_bytes: int
) -> Iterator[Passage]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Page by page: a row group may be larger than memory.
        with (
            open(path, "rb") as source,
            pyarrow.parquet.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as table,
        ):
            _check_column(file, table.schema_arrow, text_field)
            number = 0
            for group in range(table.num_row_groups):
                found = table.metadata.row_group(group)
                row_bytes = max(1, found.total_byte_size // max(1, found.num_rows))
                rows = min(PARQUET_BATCH_ROWS, max(1, PARQUET_BATCH_BYTES // row_bytes))
                for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=[text_field]):
                    for record in _cells(batch.column(0), max_record_bytes):
                        number += 1
                        held = record if isinstance(record, json_records.Bad) else {text_field: record}
                        yield from _of_record(file, number, held, text_field, dropped)
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        said = " ".join(str(error).split())
        raise DataError(f"{file.url}: cannot be read as parquet: {said}: restore it or leave it out") from error


def _check_column(file: InputFile, schema: Any, text_field: str) -> None:
    import pyarrow

    if text_field not in schema.names:
        raise DataError(
            f"{file.url}: no column {text_field!r}, it has {', '.join(schema.names)}: set prepare.text_field"
        )
    kind = schema.field(schema.names.index(text_field)).type
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    readable = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(test(value) for test in (*readable, pyarrow.types.is_null)):
        raise DataError(
            f"{file.url}: column {text_field!r} holds {kind}, not text (the columns: "
            f"{', '.join(f'{each.name} {each.type}' for each in schema)}): set prepare.text_field"
        )


def _cells(column: Any, max_record_bytes: int) -> Iterator[Any]:
    """The texts of a column; None for an empty cell, Bad for one that is no text."""
    for cell in column:
        try:
            text = cell.as_py()
        except UnicodeDecodeError:
            yield json_records.Bad("not UTF-8")
            continue
        # A character takes at most 4 bytes: most texts need not be encoded to know that they are short enough.
        if text is not None and 4 * len(text) > max_record_bytes and len(text.encode()) > max_record_bytes:
            yield json_records.Bad("longer than prepare.max_record_bytes")
        else:
            yield text
