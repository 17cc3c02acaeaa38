"""The run's metrics: rows of JSON, one file per attempt, the only truth about what happened. `rows.py` has the kinds.

A resumed attempt repeats tokens that the killed one had already trained; `effective` drops those superseded rows, so
that sums and plots count every token once.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from nltrain.store import Store
from nltrain.track.rows import AttemptRow, FaultRow, Row, RunRow, from_json, of_kind
from nltrain.track.spared import Spared

R = TypeVar("R", bound=RunRow)
FOLDER = "metrics"


class MetricsLog:
    """Appends rows to `<run folder>/metrics/attempt_0001.jsonl`; each is written at once, so a kill loses one line.

    Where the disk has no room for a row, the whole row is lost, and a line is printed.
    """

    def __init__(self, run_folder: str | Path, attempt: int) -> None:
        """The file is created with the first row."""
        self.path = Path(run_folder) / FOLDER / f"attempt_{attempt:04d}.jsonl"
        self._attempt = attempt
        self._file: IO[bytes] | None = None
        self._spared = Spared("metrics")

    def log(self, row: R) -> R:
        """Write the row with this attempt's number and the time of now; returns it as written."""
        row = dataclasses.replace(row, attempt=self._attempt, time_s=round(time.time(), 3))
        line = _line(row)
        self._spared(lambda: self._append(line))
        return row

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()

    def _append(self, line: bytes) -> None:
        """Write the whole line, or leave the file as it was and raise OSError."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError as error:
            with contextlib.suppress(OSError):  # a pipe or a device cannot be truncated
                os.ftruncate(self._file.fileno(), before)  # the next row must start on a line of its own
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def _line(row: Row) -> bytes:
    """The row as one line of a file. Strict readers refuse NaN, so it is an error here."""
    return (json.dumps(row.to_json(), allow_nan=False) + "\n").encode()


def published_key(run: str, path: Path) -> str:
    """Where the store keeps the copy of an attempt's rows."""
    return f"{run}/{FOLDER}/{path.name}"


def fetch_missing(store: Store, run: str, run_folder: str | Path) -> None:
    """Copy the rows of attempts that ran on other machines into the run's folder.

    A file that the folder has already is kept: this machine wrote it, so the copy in the store cannot be newer.
    """
    folder = Path(run_folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for found in store.list(f"{run}/{FOLDER}/"):
        path = folder / found.key.rsplit("/", 1)[-1]
        if not path.exists():
            path.write_bytes(store.get(found.key))


def log_fault(run_folder: str | Path, *, signal: str, rank: int, pid: int, tokens: int) -> None:
    """Note a fault that something outside the run caused (a planted kill); the run itself cannot write it."""
    path = Path(run_folder) / FOLDER / "faults.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(_line(FaultRow(time_s=round(time.time(), 3), signal=signal, rank=rank, pid=pid, tokens=tokens)))


def read_rows(run_folder: str | Path) -> list[Row]:
    """All rows: faults from outside, then the attempts by number, each in the order of writing.

    Clocks of machines differ, so no time decides the order. A last line that a kill cut short is left out.
    """
    return RowsReader(run_folder).read()


class RowsReader:
    """The rows of a run that may still train. A second `read` parses only what was written since the first."""

    def __init__(self, run_folder: str | Path) -> None:
        """Reads nothing yet; the folder need not exist."""
        self._folder = Path(run_folder) / FOLDER
        self._found: dict[Path, tuple[int, list[Row]]] = {}  # by file: bytes parsed, and their rows

    def read(self) -> list[Row]:
        """All rows until now, as `read_rows` returns them."""
        rows: list[Row] = []
        for path in sorted(self._folder.glob("*.jsonl"), key=lambda path: (path.stem != "faults", path.name)):
            position, known = self._found.setdefault(path, (0, []))
            for line in _whole_lines(path, position):
                position += len(line)
                known.append(from_json(json.loads(line)))
            self._found[path] = position, known
            rows += known
        return rows


def _whole_lines(path: Path, position: int) -> Iterator[bytes]:
    """The lines from byte `position` on, without a last one that is not complete yet."""
    with path.open("rb") as file:
        file.seek(position)
        for line in file:
            if line.endswith(b"\n"):
                yield line


def on_one_clock(rows: Iterable[Row]) -> list[Row]:
    """Rows of attempts in order, with times that never run backwards from one attempt to the next.

    Attempts may be written by machines whose clocks differ. Where an attempt seems to begin before the last row of the
    one before, all its times are moved forward so that it begins there. Limit: a clock that is ahead looks like a
    pause.
    """
    moved: list[Row] = []
    attempt: int | None = None
    shift_s, latest_s = 0.0, -math.inf
    for row in rows:
        if isinstance(row, RunRow):
            if row.attempt != attempt:
                attempt = row.attempt
                shift_s = max(0.0, latest_s - began_s(row))
            row = _later(row, shift_s) if shift_s else row
            latest_s = max(latest_s, row.time_s)
        moved.append(row)
    return moved


def began_s(row: RunRow) -> float:
    """Unix time at which the attempt whose first row this is began to work."""
    return (row.started_s if isinstance(row, AttemptRow) else 0.0) or row.time_s


def _later(row: RunRow, shift_s: float) -> RunRow:
    if isinstance(row, AttemptRow) and row.started_s:
        row = dataclasses.replace(row, started_s=row.started_s + shift_s)
    return dataclasses.replace(row, time_s=row.time_s + shift_s)


def tail(path: Path, poll_s: float = 0.2) -> Iterator[Row | None]:
    """Rows of a file as they appear; None whenever there is nothing new for `poll_s` seconds. Never ends by itself."""
    position = 0
    while True:
        if path.exists():
            for line in _whole_lines(path, position):
                position += len(line)
                yield from_json(json.loads(line))
        yield None
        time.sleep(poll_s)


def effective(rows: Iterable[Row]) -> list[Row]:
    """Rows that count: those of an attempt beyond the point where a later attempt resumed are superseded."""
    rows = list(rows)
    resumed_at = {row.attempt: row.tokens for row in of_kind(rows, AttemptRow)}
    limit: dict[int, int] = {}
    lowest: int | None = None
    for attempt in sorted(resumed_at, reverse=True):
        if lowest is not None:
            limit[attempt] = lowest
        lowest = resumed_at[attempt] if lowest is None else min(lowest, resumed_at[attempt])

    def counts(row: Row) -> bool:
        if not isinstance(row, RunRow) or isinstance(row, AttemptRow) or row.attempt not in limit:
            return True
        return row.tokens <= limit[row.attempt]

    return [row for row in rows if counts(row)]
