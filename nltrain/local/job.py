"""A job that `ray job submit` runs on a local cluster: its log as a file, line by line, and its exit code."""

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

POLL_S = 0.1


class Job:
    """A submitted job. The output of `ray job submit`, which is the job's log, is appended to a file."""

    def __init__(self, arguments: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]) -> None:
        """arguments: those of `ray job submit`, which runs in `folder` under `environment`. Returns at once."""
        self.log_path = log
        self._start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", *arguments],
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # Ctrl-C at the terminal is for the program that submits, which then ends what it has started.
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """What this job has printed so far."""
        return self._read(self._start).decode("utf-8", "replace")

    @property
    def exit_code(self) -> int | None:
        """The exit code of `ray job submit`, 0 where the job succeeded; None while it runs."""
        return self._process.poll()

    def lines(self) -> Iterator[str]:
        """The lines of the log, each with its line end, as they appear; ends with the job."""
        position = self._start
        while True:
            ended = self.exit_code is not None
            found = self._read(position)
            if not ended:
                found = found[: found.rfind(b"\n") + 1]
            position += len(found)
            yield from found.decode("utf-8", "replace").splitlines(keepends=True)
            if ended:
                return
            time.sleep(POLL_S)

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code, once the job has ended. Raises subprocess.TimeoutExpired."""
        return self._process.wait(timeout_s)

    def _read(self, position: int) -> bytes:
        """The bytes of the log from `position` on."""
        with self.log_path.open("rb") as file:
            file.seek(position)
            return file.read()
