"""Finds the processes that an orchestrator of ours has started, and ends them: by pid, never by name.

A process started with `Owner.environment` carries an id that its children inherit, so the daemons, workers and agents
of a local cluster can be found even where their parents have ended. An owner that was itself killed leaves a record;
the next one finds the record and ends what is left. Needs a system where the environment of one's own processes can be
read (Linux, macOS).
"""

import json
import os
import time
import uuid
from pathlib import Path

import psutil

from nltrain.local.environment import short_folder

VARIABLE = "NLTRAIN_OWNER"


class Owner:
    """The identity of an orchestrator; its processes carry it, and a record of it survives a crash.

    `short` is a symbolic link in /tmp, or another short folder, to the run's folder: paths of Unix sockets must stay
    below 108 bytes.
    """

    def __init__(self, run_folder: Path) -> None:
        self.id = uuid.uuid4().hex
        self.short = short_folder() / f"nl-{self.id[:8]}"
        records = record_folder(run_folder)
        records.mkdir(parents=True, exist_ok=True)
        self._record = records / f"{self.id}.json"
        me = psutil.Process()
        partial = self._record.with_suffix(".partial")
        partial.write_text(json.dumps({"pid": me.pid, "started_s": me.create_time(), "link": str(self.short)}))
        partial.replace(self._record)
        self.short.symlink_to(run_folder)

    @property
    def environment(self) -> dict[str, str]:
        """The variable that marks a process, and all its children, as this owner's."""
        return {VARIABLE: self.id}

    def processes(self) -> list[psutil.Process]:
        """The owner's live processes, other than this one."""
        return owned(self.id)

    def close(self, grace_s: float = 5.0) -> None:
        """End every process of ours that is still there, then forget the record."""
        stop(self.id, grace_s)
        self.short.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)


def record_folder(run_folder: Path) -> Path:
    """The folder of the records of all orchestrators whose run folders have one parent."""
    return run_folder.parent / ".owners"


def owned(owner_id: str) -> list[psutil.Process]:
    """Live processes other than this one whose environment carries the id."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.pid != os.getpid() and process.environ().get(VARIABLE) == owner_id
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue  # gone in between, or another user's
    return found


def stop(owner_id: str, grace_s: float = 5.0) -> int:
    """SIGTERM, then SIGKILL what is left after the grace time; returns how many there were."""
    ended: set[int] = set()
    for attempt in range(5):  # a dying daemon may still start a child
        processes = owned(owner_id)
        if not processes:
            break
        ended |= {process.pid for process in processes}
        for process in processes:
            _signal(process, kill=attempt > 0)
        psutil.wait_procs(processes, timeout=grace_s)
    return len(ended)


def reap_abandoned(run_folder: Path) -> list[str]:
    """End the processes of orchestrators that were killed before they could clean up; returns a line for each."""
    lines = []
    for path in sorted(record_folder(run_folder).glob("*.json")):
        record = json.loads(path.read_text())
        if _alive(record["pid"], record["started_s"]):
            continue
        count = stop(path.stem)
        if os.path.islink(record["link"]):
            os.unlink(record["link"])
        path.unlink(missing_ok=True)
        lines.append(f"an earlier run (pid {record['pid']}) was killed: {count} of its processes ended now")
    return lines


def wait_gone(owner_id: str, timeout_s: float) -> list[psutil.Process]:
    """Processes of the owner that are still there after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (left := owned(owner_id)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _alive(pid: int, started_s: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started_s) < 1.0
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return
