"""The run's metrics: rows of JSON, one file per attempt, the only truth about what happened.

A row is a flat dict with `kind`, `attempt`, `tokens` (T at that moment) and `time_s` (Unix). Kinds: attempt (a start or
resume), step, left_out (what the guard left out, by rank and sample), tick, validation, checkpoint, sample, fault, end.
A resumed attempt repeats tokens that the killed one had already trained; `effective` drops those superseded rows, so
that sums and plots count every token once.
"""

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from nltrain.track.spared import Spared

Row = dict[str, Any]
FOLDER = "metrics"


class EventStore(Protocol):
    """The part of a store that rows and events need."""

    def get(self, key: str) -> bytes: ...

    def put(self, key: str, data: bytes) -> None: ...

    def list(self, prefix: str = "") -> Any: ...


class MetricsLog:
    """Appends rows to `<run folder>/metrics/attempt_0001.jsonl`; each is written at once, so a kill loses one line.

    A row for which there is no room is lost, whole, with a line.
    """

    def __init__(self, run_folder: str | Path, attempt: int) -> None:
        self.path = Path(run_folder) / FOLDER / f"attempt_{attempt:04d}.jsonl"
        self._attempt = attempt
        self._file: IO[bytes] | None = None
        self._spared = Spared("metrics")

    def log(self, kind: str, tokens: int, **values: Any) -> Row:
        row = {"kind": kind, "attempt": self._attempt, "tokens": tokens, "time_s": round(time.time(), 3)} | values
        # JSON has no NaN: strict readers would refuse the file.
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        self._spared(lambda: self._append(line))
        return row

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _append(self, line: bytes) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError as error:
            with contextlib.suppress(OSError):  # what is no file on a disk cannot be cut
                os.ftruncate(self._file.fileno(), before)  # the next row must not follow on half a line
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def published_key(run: str, path: Path) -> str:
    """Where the store keeps the copy of an attempt's rows."""
    return f"{run}/{FOLDER}/{path.name}"


def fetch_missing(store: EventStore, run: str, run_folder: str | Path) -> None:
    """Bring the rows of attempts that other machines wrote down; a file that is here already is the newer one."""
    folder = Path(run_folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for found in store.list(f"{run}/{FOLDER}/"):
        path = folder / found.key.rsplit("/", 1)[-1]
        if not path.exists():
            path.write_bytes(store.get(found.key))


def log_fault(run_folder: str | Path, **values: Any) -> None:
    """Note a fault that something outside the run caused (a planted kill); the run itself cannot write it."""
    path = Path(run_folder) / FOLDER / "faults.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "fault", "time_s": round(time.time(), 3)} | values) + "\n")


def read_rows(run_folder: str | Path) -> list[Row]:
    """All rows: faults from outside, then attempt after attempt in the order of writing, whatever the clocks of the
    machines said. A last line torn by a kill is left out."""
    rows: list[Row] = []
    paths = sorted((Path(run_folder) / FOLDER).glob("*.jsonl"), key=lambda path: (path.stem != "faults", path.name))
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
    return rows


def on_one_clock(rows: Iterable[Row]) -> list[Row]:
    """Rows of attempts in order, with times that never run backwards from one attempt to the next.

    Attempts may be written by machines whose clocks differ: one that seems to begin before the last row of the one
    before is moved to that row. A clock that is ahead cannot be told from a pause.
    """
    moved: list[Row] = []
    attempt: int | None = None
    shift_s, latest_s = 0.0, -math.inf
    for row in rows:
        if "attempt" not in row:
            moved.append(row)
            continue
        if row["attempt"] != attempt:
            attempt = row["attempt"]
            begun_s = row.get("started_s") or row["time_s"]
            shift_s = max(0.0, latest_s - begun_s)
        later = {name: row[name] + shift_s for name in ("time_s", "started_s") if row.get(name) is not None}
        moved.append(row | later)
        latest_s = max(latest_s, moved[-1]["time_s"])
    return moved


def tail(path: Path, poll_s: float = 0.2) -> Iterator[Row | None]:
    """Rows of a file as they appear; None whenever there is nothing new for `poll_s` seconds. Never ends by itself."""
    position = 0
    while True:
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    position += len(line)
                    yield json.loads(line)
        yield None
        time.sleep(poll_s)


def effective(rows: Iterable[Row]) -> list[Row]:
    """Rows that count: those of an attempt beyond the point where a later attempt resumed are superseded."""
    rows = list(rows)
    resumed_at = {row["attempt"]: row["tokens"] for row in rows if row["kind"] == "attempt"}
    limit: dict[int, int] = {}
    lowest: int | None = None
    for attempt in sorted(resumed_at, reverse=True):
        if lowest is not None:
            limit[attempt] = lowest
        lowest = resumed_at[attempt] if lowest is None else min(lowest, resumed_at[attempt])

    def counts(row: Row) -> bool:
        return row.get("attempt") not in limit or row["kind"] == "attempt" or row["tokens"] <= limit[row["attempt"]]

    return [row for row in rows if counts(row)]
