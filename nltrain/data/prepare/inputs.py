"""Which files are read: those of a known kind, each once; every other file is passed over, counted and listed.

Guarantees: files are sorted by name and cut into groups by names and sizes alone; links are followed, but a file that
is reached twice is read once, and a loop of links ends; a folder that cannot be listed raises DataError. Limits: only
local files are recognised when they are reached twice; S3 has no links.
"""

import functools
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nltrain.data.errors import DataError
from nltrain.store import LocalStore, open_store
from nltrain.store.places import PlaceError, S3Place, absolute_place, join_url, parse_place, shown

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
TEXT_KINDS, LINE_KINDS = (".txt", ".md"), (".jsonl", ".ndjson", ".json")
RECORD_KINDS = (*LINE_KINDS, ".parquet")
EXAMPLES_KEPT = 20
OWN = "the output or the tokenizer of this job"

Progress = Callable[[str], None]
"""Takes one line of the log."""


@dataclass(frozen=True)
class InputFile:
    """One file of documents."""

    name: str
    """The last part of the input's path and the path below it; stable and unique."""
    root: str
    """URL of the folder that `key` is relative to."""
    key: str
    num_bytes: int
    modified_s: float = 0.0

    @functools.cached_property
    def url(self) -> str:
        """URL for messages: one printable line."""
        return shown(join_url(self.root, self.key))


@dataclass
class PassedOver:
    """Files of the inputs that are not read: their number by reason, and the names of the first ones of each reason."""

    by_reason: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        """Counts one file."""
        self.by_reason[reason] += 1
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES_KEPT:
            kept.append(shown(name))

    def lines(self) -> Iterator[str]:
        """One line for each reason."""
        for reason, count in sorted(self.by_reason.items()):
            yield f"passed over, {reason}: {count}, first: {', '.join(self.examples[reason][:3])}"


def file_kind(name: str) -> str | None:
    """.txt, .md, .jsonl, .ndjson, .json or .parquet; None for a file that is none of them."""
    path = Path(name.lower())
    if path.suffix in COMPRESSIONS:
        path = path.with_suffix("")
        return path.suffix if path.suffix in (*TEXT_KINDS, *LINE_KINDS) else None
    return path.suffix if path.suffix in (*TEXT_KINDS, *RECORD_KINDS) else None


def compression(name: str) -> str:
    """The suffix of a compressed file's name; empty for a file that is not compressed."""
    suffix = Path(name.lower()).suffix
    return suffix if suffix in COMPRESSIONS else ""


def list_inputs(
    inputs: Sequence[str],
    progress: Progress = print,
    passed_over: PassedOver | None = None,
    not_read: Sequence[str] = (),
) -> list[InputFile]:
    """The files of a known kind in these files, folders and s3:// prefixes, sorted by name; logs what is passed over.

    not_read: URLs of the output and the tokenizer, which may lie inside an input. Raises DataError for an input that
    holds no file to read, one that is listed twice, and a folder that cannot be listed.
    """
    passed_over = PassedOver() if passed_over is None else passed_over
    seen = _Seen(not_read)
    files: list[InputFile] = []
    for url in inputs:
        before = passed_over.by_reason.total()
        found = list(_list_one(url, seen, passed_over))
        if not found and passed_over.by_reason.total() == before:
            raise DataError(f"prepare.input: {shown(url)}: no files there: check the path{_hint(url, inputs)}")
        for file in found:
            if file_kind(file.key) is None:
                passed_over.add(file.name, f"another kind ({Path(file.key).suffix.lower() or 'no suffix'})")
            elif not file.num_bytes and not compression(file.key) and file_kind(file.key) != ".parquet":
                passed_over.add(file.name, "an empty file")
            else:
                files.append(file)
    for line in passed_over.lines():
        progress(line)
    if not files:
        kinds = ", ".join((*TEXT_KINDS, *RECORD_KINDS))
        raise DataError(
            f"prepare.input: {shown(', '.join(inputs))}: no {kinds} file there with anything in it: check the path"
        )
    repeated = [name for name, count in Counter(file.name for file in files).items() if count > 1]
    if repeated:
        raise DataError(
            f"prepare.input: two inputs both have {shown(repeated[0])!r}: give their common parent folder instead"
        )
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


def most_good_records(files: Sequence[InputFile], text_field: str) -> int | None:
    """An upper bound of the good records in these files, by names and sizes; None where only reading can tell."""
    # The shortest record: {"field":"x"} and a newline.
    record_bytes = len(text_field.encode("utf-8", "surrogatepass")) + len('{"":"x"}\n')
    count = 0
    for file in files:
        kind = file_kind(file.key)
        if kind in TEXT_KINDS:
            count += 1
        elif kind in LINE_KINDS and not compression(file.key):
            count += file.num_bytes // record_bytes + 1
        else:
            return None
    return count


class _Seen:
    """What was listed already, and what must not be read because it belongs to the job: its output and tokenizer."""

    def __init__(self, not_read: Sequence[str]) -> None:
        self.folders: set[tuple[int, int]] = set()
        self.files: set[tuple[int, int]] = set()
        self.s3: list[str] = []
        self.output: tuple[int, int] | None = None
        self._own_s3: list[str] = []
        self._own_files: set[tuple[int, int]] = set()
        for url in filter(None, not_read):
            store = open_store(url)
            if not isinstance(store, LocalStore):
                self._own_s3.append(store.url)
            elif store.folder.is_dir():
                self.output = self.identity(store.folder)
                self.folders.add(self.output)
            elif store.folder.is_file():
                self._own_files.add(self.identity(store.folder))

    @staticmethod
    def identity(path: Path | str) -> tuple[int, int]:
        """(device, inode) of what the path leads to. Raises OSError when there is nothing."""
        info = os.stat(path)
        return info.st_dev, info.st_ino

    def is_own_file(self, identity: tuple[int, int]) -> bool:
        """Whether a local file is the job's own."""
        return identity in self._own_files

    def is_own_object(self, url: str) -> bool:
        """Whether an S3 object is the job's own."""
        return any(url == own or url.startswith(f"{own}/") for own in self._own_s3)


def _hint(url: str, inputs: Sequence[str]) -> str:
    if len(inputs) > 1 or "," in url:
        return """, a path with a comma in it is written input='["/a,b"]'"""
    if any(c in url for c in "*?"):
        return ", patterns are not expanded: name the folder"
    return ""


def _list_one(url: str, seen: _Seen, passed_over: PassedOver) -> Iterator[InputFile]:
    try:
        store = open_store(absolute_place("prepare.input", url))
    except PlaceError as error:
        raise DataError(str(error)) from None
    if isinstance(store, LocalStore):
        yield from _list_local(store.folder, seen, passed_over)
        return
    for other in seen.s3:
        if store.url == other or store.url.startswith(f"{other}/") or other.startswith(f"{store.url}/"):
            raise DataError(f"prepare.input: {shown(url)}: two inputs both have its objects: leave one of them out")
    seen.s3.append(store.url)
    place = parse_place(store.url)
    if not isinstance(place, S3Place):  # a store of another scheme: a folder
        yield from (InputFile(item.key, store.url, *item) for item in store.list())
        return
    own_name = place.prefix.rpartition("/")[2]
    found, bucket = store.list(), open_store(f"s3://{place.bucket}")
    if place.prefix and not url.endswith("/") and bucket.exists(place.prefix):
        alone = next(item for item in bucket.list(place.prefix) if item.key == place.prefix)
        if not found:
            yield InputFile(own_name, bucket.url, *alone)
            return
        if alone.num_bytes:
            raise DataError(
                f"prepare.input: {shown(url)}: is an object and a folder: end the URL with / for the folder, or move "
                "the object"
            )
    for item in found:
        name = f"{own_name}/{item.key}" if own_name else item.key
        if item.key.endswith("/") and not item.num_bytes:
            passed_over.add(name, "an object that shows an empty folder")
        elif seen.is_own_object(join_url(store.url, item.key)):
            passed_over.add(name, OWN)
        else:
            yield InputFile(name, store.url, *item)


def _list_local(path: Path, seen: _Seen, passed_over: PassedOver) -> Iterator[InputFile]:
    """A file, or the files below a folder: first those that lie there, then those that links lead to."""
    try:
        info = path.stat()
    except OSError:
        return  # nothing there: the caller raises
    root, own_name = str(path.parent), path.name
    if not stat.S_ISDIR(info.st_mode):
        if not stat.S_ISREG(info.st_mode):
            raise DataError(f"prepare.input: {shown(str(path))}: not a regular file or folder: copy it into one")
        seen.files.add(seen.identity(path))
        yield InputFile(own_name, root, own_name, info.st_size, info.st_mtime)
        return
    if seen.output == seen.identity(path):
        raise DataError(f"prepare.input: {shown(str(path))}: is the output as well: choose another output")
    if seen.identity(path) in seen.folders:
        raise DataError(
            f"prepare.input: two inputs both have {shown(own_name)!r}: give their common parent folder instead"
        )
    seen.folders.add(seen.identity(path))
    pending: list[str] = [""]
    links: list[str] = []
    while pending or links:
        if pending:
            below = pending.pop()
        else:
            below = links.pop(0)
            identity = _identity(path / below)
            if identity in seen.folders:
                passed_over.add(f"{own_name}/{below}", "a link to a folder that is read or holds the output")
                continue
            if identity is None:
                passed_over.add(f"{own_name}/{below}", "a link that leads nowhere")
                continue
            if not (path / below).is_dir():
                yield from _linked_file(path, below, identity, seen, passed_over)
                continue
            seen.folders.add(identity)
        yield from _list_folder(path, below, seen, passed_over, pending, links)


def _list_folder(
    path: Path, below: str, seen: _Seen, passed_over: PassedOver, pending: list[str], links: list[str]
) -> Iterator[InputFile]:
    """The regular files of one folder; appends its sub-folders to `pending` and its links to `links`."""
    try:
        entries = sorted(os.scandir(path / below), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"prepare.input: {shown(str(path / below))}: cannot be listed: {error.strerror}: check its rights"
        ) from error
    folders = []
    for entry in entries:
        key = f"{below}/{entry.name}" if below else entry.name
        name = f"{path.name}/{key}" if path.name else key
        if entry.is_symlink():
            links.append(key)
        elif entry.is_dir():
            identity = seen.identity(entry.path)
            if identity in seen.folders:
                passed_over.add(name, "a folder that is read already or holds the output")
            else:
                seen.folders.add(identity)
                folders.append(key)
        elif not entry.is_file():
            passed_over.add(name, "not a regular file")
        else:
            info = entry.stat()
            if seen.is_own_file((info.st_dev, info.st_ino)):
                passed_over.add(name, OWN)
                continue
            seen.files.add((info.st_dev, info.st_ino))
            yield InputFile(name, str(path), key, info.st_size, info.st_mtime)
    pending += reversed(folders)


def _linked_file(
    path: Path, below: str, identity: tuple[int, int], seen: _Seen, passed_over: PassedOver
) -> Iterator[InputFile]:
    name = f"{path.name}/{below}" if path.name else below
    info = (path / below).stat()
    if seen.is_own_file(identity):
        passed_over.add(name, OWN)
    elif identity in seen.files:
        passed_over.add(name, "a link to a file that is read already")
    elif not stat.S_ISREG(info.st_mode):
        passed_over.add(name, "not a regular file")
    else:
        seen.files.add(identity)
        yield InputFile(name, str(path), below, info.st_size, info.st_mtime)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        return _Seen.identity(path)
    except OSError:  # a link to nothing, or to itself
        return None
