"""Input files and the documents in them: .txt, .md, .jsonl and .parquet, the first three also as .gz or .zst.

Guarantees: files are listed in the order of their names and cut into groups by names and sizes alone; a bad record
is counted and reported with file and line, never passed over in silence; a file that cannot be read at all stops the
work with its URL. A text file is one document; a JSONL line or a parquet row is one, named file:line.
"""

import contextlib
import gzip
import io
import json
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from nltrain.data.corpus import Document
from nltrain.data.errors import DataError
from nltrain.data.store import LocalStore, Store, join_url, open_store

COMPRESSIONS = (".gz", ".zst")
TEXT_KINDS, RECORD_KINDS = (".txt", ".md"), (".jsonl", ".parquet")
DOWNLOAD_PART_BYTES = 16 << 20
# Below this many records a share says little; the end of a group checks it in any case.
RECORDS_BEFORE_STOPPING = 1000
EXAMPLES_KEPT = 20

Report = Callable[[str], None]


@dataclass(frozen=True)
class InputFile:
    """One file of documents."""

    name: str
    """Stable, unique: the input's own name and the path below it."""
    root: str
    """URL of the folder that `key` is relative to."""
    key: str
    num_bytes: int
    modified_s: float = 0.0

    @property
    def url(self) -> str:
        return join_url(self.root, self.key)


@dataclass
class Dropped:
    """Records that gave no document: how many for which reason, and where the first ones are."""

    max_fraction: float
    num_records: int = 0
    by_reason: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        """Counts one."""
        self.by_reason[reason] += 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(f"{where}: {reason}")

    def check(self, finished: bool = False) -> None:
        """Raises DataError when the share is over the threshold."""
        num_bad = self.by_reason.total()
        enough = finished or self.num_records >= RECORDS_BEFORE_STOPPING
        if enough and num_bad > self.max_fraction * self.num_records:
            raise DataError(
                f"prepare.max_bad_fraction: {self.max_fraction}: {num_bad} of {self.num_records} records are bad, "
                f"first: {self.examples[0]}: mend the input or raise the threshold"
            )


def file_kind(name: str) -> str | None:
    """.txt, .md, .jsonl or .parquet; None for a file that is none of them."""
    path = Path(name.lower())
    if path.suffix in COMPRESSIONS:
        path = path.with_suffix("")
        return path.suffix if path.suffix in (*TEXT_KINDS, ".jsonl") else None
    return path.suffix if path.suffix in (*TEXT_KINDS, *RECORD_KINDS) else None


def list_inputs(inputs: Sequence[str], report: Report = print) -> list[InputFile]:
    """The readable files of these files, folders and s3:// prefixes, sorted by name; others are reported."""
    files: list[InputFile] = []
    ignored: list[InputFile] = []
    for url in inputs:
        found = list(_list_one(url))
        if not found:
            raise DataError(f"prepare.input: {url}: no files there: check the path")
        for file in found:
            (files if file_kind(file.key) else ignored).append(file)
    if ignored:
        report(f"{len(ignored)} files of other kinds are not read, first: {ignored[0].url}")
    if not files:
        kinds = ", ".join((*TEXT_KINDS, *RECORD_KINDS))
        raise DataError(f"prepare.input: {', '.join(inputs)}: no {kinds} file there: check the path")
    repeated = [name for name, count in Counter(file.name for file in files).items() if count > 1]
    if repeated:
        raise DataError(f"prepare.input: two inputs both have {repeated[0]!r}: give their common parent folder instead")
    return sorted(files, key=lambda file: file.name)


def cut_groups(files: Sequence[InputFile], group_bytes: int) -> list[list[InputFile]]:
    """Neighbouring files whose sizes together stay within group_bytes (a larger file is a group of its own)."""
    groups: list[list[InputFile]] = []
    num_bytes = 0
    for file in files:
        if not groups or num_bytes + file.num_bytes > group_bytes:
            groups.append([])
            num_bytes = 0
        groups[-1].append(file)
        num_bytes += file.num_bytes
    return groups


def read_documents(files: Sequence[InputFile], text_field: str, dropped: Dropped) -> Iterator[Document]:
    """The documents of these files, in order; what cannot be one is added to `dropped`."""
    stores: dict[str, Store] = {}
    for file in files:
        kind = file_kind(file.key)
        store = stores.get(file.root) or stores.setdefault(file.root, open_store(file.root))
        with _local_path(store, file) as path:
            if kind in TEXT_KINDS:
                documents = _read_text(file, path, dropped)
            elif kind == ".jsonl":
                documents = _read_jsonl(file, path, text_field, dropped)
            else:
                documents = _read_parquet(file, path, text_field, dropped)
            for document in documents:
                yield document
                dropped.check()
    dropped.check(finished=True)


def _list_one(url: str) -> Iterator[InputFile]:
    trimmed = url.rstrip("/")
    root, _, own_name = trimmed.rpartition("/")
    local = open_store(trimmed)
    if isinstance(local, LocalStore):
        path = local.folder
        root, own_name = str(path.parent), path.name
        if path.is_file():
            yield InputFile(own_name, root, own_name, path.stat().st_size, path.stat().st_mtime)
            return
    elif not root.startswith("s3://"):  # the bucket itself
        root, own_name = trimmed, ""
    else:
        beside = [found for found in open_store(root).list(own_name) if found.key == own_name]
        if beside:
            yield InputFile(own_name, root, own_name, beside[0].num_bytes, beside[0].modified_s)
            return
    for key, num_bytes, modified_s in local.list():
        yield InputFile(f"{own_name}/{key}" if own_name else key, local.url, key, num_bytes, modified_s)


@contextlib.contextmanager
def _local_path(store: Store, file: InputFile) -> Iterator[Path]:
    """The file on a local disk; a remote one is brought by parts, so that its size does not matter."""
    if isinstance(store, LocalStore):
        yield store.folder / file.key
        return
    with tempfile.TemporaryDirectory(prefix="nltrain-input-") as folder:
        path = Path(folder, "input")
        with open(path, "wb") as target:
            for start in range(0, file.num_bytes, DOWNLOAD_PART_BYTES):
                target.write(store.get_range(file.key, start, min(DOWNLOAD_PART_BYTES, file.num_bytes - start)))
        yield path


@contextlib.contextmanager
def _opened(file: InputFile, path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed; damage becomes a DataError with its URL."""
    import zstandard

    try:
        with contextlib.ExitStack() as stack:
            stream: BinaryIO = stack.enter_context(open(path, "rb"))
            if file.key.endswith(".gz"):
                stream = stack.enter_context(gzip.GzipFile(fileobj=stream))  # type: ignore[assignment]
            elif file.key.endswith(".zst"):
                reader = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
                stream = stack.enter_context(reader)  # type: ignore[assignment]
            yield stack.enter_context(io.BufferedReader(stream, 1 << 20))  # type: ignore[type-var]
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{file.url}: cannot be read: {error}: restore the file or leave it out") from error


def _read_text(file: InputFile, path: Path, dropped: Dropped) -> Iterator[Document]:
    dropped.num_records += 1
    with _opened(file, path) as stream:
        data = stream.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        dropped.add(f"{file.url}:{line}", "not UTF-8")
        return
    if text:
        yield Document(file.name, text)
    else:
        dropped.add(f"{file.url}:1", "empty text")


def _read_jsonl(file: InputFile, path: Path, text_field: str, dropped: Dropped) -> Iterator[Document]:
    with _opened(file, path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            dropped.num_records += 1
            try:
                record = json.loads(line)
            except UnicodeDecodeError:
                dropped.add(f"{file.url}:{number}", "not UTF-8")
                continue
            except ValueError:
                dropped.add(f"{file.url}:{number}", "not JSON")
                continue
            text = record.get(text_field) if isinstance(record, dict) else None
            yield from _checked(file, number, text, text_field, dropped)


def _read_parquet(file: InputFile, path: Path, text_field: str, dropped: Dropped) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise DataError(
                    f"{file.url}: no column {text_field!r}, it has {', '.join(names)}: set prepare.text_field"
                )
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    dropped.num_records += 1
                    yield from _checked(file, number, text, text_field, dropped)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.url}: cannot be read as parquet: {error}: restore it or leave it out") from error


def _checked(file: InputFile, number: int, text: object, text_field: str, dropped: Dropped) -> Iterator[Document]:
    where = f"{file.url}:{number}"
    if not isinstance(text, str):
        dropped.add(where, f"no text in {text_field!r}")
    elif not text:
        dropped.add(where, "empty text")
    else:
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, as JSON can spell it
            dropped.add(where, "not UTF-8")
            return
        yield Document(f"{file.name}:{number}", text)
